//! What systemd is told of this process, where it asks to be (`Type=notify`).

use std::time::Duration;

use sd_notify::NotifyState;

/// What stopping takes besides `turn.drain`: the seed's goodbyes, and the disk.
const IN_ORDER: Duration = Duration::from_secs(15);

/// All services take connections.
pub(crate) fn ready() {
    say(&[NotifyState::Ready]);
}

/// The process has begun to stop, and gives calls so long to end: the unit's own limit (`TimeoutStopSec`) cannot know.
pub(crate) fn stopping(drain: Duration) {
    let micros = u32::try_from((drain + IN_ORDER).as_micros()).unwrap_or(u32::MAX);
    say(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(micros)]);
}

fn say(state: &[NotifyState<'_>]) {
    // Without systemd there is nobody to tell, which is no error.
    if let Err(error) = sd_notify::notify(state) {
        tracing::warn!(%error, "systemd cannot be told");
    }
}
