//! How far a long command is, for a person at a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A bar on standard error, or nothing where no terminal is. `what` names what is counted.
pub(super) fn bar(total: u64, what: &'static str) -> ProgressBar {
    // Hides itself where standard error is no terminal.
    let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr_with_hz(10));
    match ProgressStyle::with_template("{bar:30} {human_pos} of {human_len} {msg}, {eta} left") {
        Ok(style) => bar.with_style(style).with_message(what),
        // The template is ours: a bar of another look is no reason to fail.
        Err(_) => bar,
    }
}
