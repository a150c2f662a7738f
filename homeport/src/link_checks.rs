//! `/check/link`: where the connection check asks for a link with the seed. A page has no key to sign events with, so
//! this process says for it what it wants, through its own relay.

use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::sync::Arc;

use axum::Json;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use serde::Deserialize;
use serde_json::json;
use service::Origin;
use tokio::sync::Semaphore;

use crate::probe::meeting::{Meeting, MeetingError, MeetingPlace};
use crate::status::Status;

/// Checks of one address in a minute.
const PER_MINUTE: NonZeroU32 = NonZeroU32::MIN.saturating_add(9);
/// Checks at a time.
const AT_A_TIME: usize = 8;
/// The longest description of a page that wants nothing but a data channel.
const MAX_DESCRIPTION: usize = 16 << 10;

/// Asks for links, within bounds.
pub(crate) struct Checks {
    place: MeetingPlace,
    /// Whether there must be a seed; elsewhere there may be one in another process.
    has_seed: bool,
    proxy_header: Option<HeaderName>,
    rate: DefaultKeyedRateLimiter<Origin>,
    running: Semaphore,
}

impl Checks {
    pub(crate) fn new(place: MeetingPlace, has_seed: bool, proxy_header: Option<HeaderName>) -> Self {
        let rate = RateLimiter::keyed(Quota::per_minute(PER_MINUTE));
        Self { place, has_seed, proxy_header, rate, running: Semaphore::new(AT_A_TIME) }
    }

    fn admits(&self, client: SocketAddr, headers: &HeaderMap) -> bool {
        if self.rate.len() > 10_000 {
            self.rate.retain_recent();
        }
        self.rate.check_key(&Origin::of(relay::client_address(client, headers, self.proxy_header.as_ref()))).is_ok()
    }
}

/// What a page sends.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Asked {
    sdp: String,
}

/// Answers a page's offer with the seed's description.
pub(crate) async fn check_link(
    State(status): State<Arc<Status>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
    Json(asked): Json<Asked>,
) -> Response {
    let no = |status: StatusCode, reason: &str| (status, Json(json!({ "reason": reason }))).into_response();
    let Some(checks) = status.checks() else {
        return no(StatusCode::NOT_FOUND, "this server knows of no seed peer");
    };
    if asked.sdp.len() > MAX_DESCRIPTION {
        return no(StatusCode::PAYLOAD_TOO_LARGE, "that is no description of a data channel");
    }
    let (true, Ok(_running)) = (checks.admits(client, &headers), checks.running.try_acquire()) else {
        return no(StatusCode::TOO_MANY_REQUESTS, "too many checks; try again in a minute");
    };
    let answer = async {
        let (mut meeting, _) = Meeting::join(checks.place.clone()).await?;
        let answer = meeting.ask(&asked.sdp).await;
        meeting.leave().await;
        answer
    };
    match answer.await {
        Ok(sdp) => {
            let headers = [(header::CACHE_CONTROL, HeaderValue::from_static("no-store"))];
            (headers, Json(json!({ "sdp": sdp }))).into_response()
        }
        Err(MeetingError::NoSeed) if !checks.has_seed => no(StatusCode::NOT_FOUND, "no seed peer answers"),
        Err(error) => no(StatusCode::BAD_GATEWAY, &error.to_string()),
    }
}
