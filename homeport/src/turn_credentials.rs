//! `/turn-credentials`: time-limited credentials for the TURN server, for apps to hand to their users.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use governor::{DefaultKeyedRateLimiter, Quota, RateLimiter};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use service::Origin;
use turn_server::{Minted, mint};

use crate::turn_servers::TurnServers;

/// The name in credentials, which quotas count as one user.
const NAME: &str = "app";

/// Where a TURN server is, for apps.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct TurnPlace {
    /// A name or an address, as it stands in a URL.
    pub(crate) host: String,
    /// The port of UDP and TCP.
    pub(crate) port: u16,
    /// The port of TLS.
    pub(crate) tls_port: Option<u16>,
}

impl TurnPlace {
    /// Where to ask for one's own address.
    pub(crate) fn stun_uri(&self) -> String {
        format!("stun:{}:{}", self.host, self.port)
    }

    /// The ways to the server, the fastest first.
    pub(crate) fn turn_uris(&self) -> Vec<String> {
        let Self { host, port, tls_port } = self;
        let mut uris = vec![format!("turn:{host}:{port}?transport=udp"), format!("turn:{host}:{port}?transport=tcp")];
        uris.extend(tls_port.map(|port| format!("turns:{host}:{port}?transport=tcp")));
        uris
    }
}

/// Gives credentials to whom the settings say.
pub(crate) struct TurnCredentials {
    servers: Arc<TurnServers>,
    secret: String,
    lifetime: Duration,
    token: Option<String>,
    /// Origins of pages that may ask; `*` is all.
    origins: Vec<String>,
    proxy_header: Option<HeaderName>,
    rate: Option<DefaultKeyedRateLimiter<Origin>>,
}

/// How to give credentials.
#[derive(Debug, Clone)]
pub(crate) struct CredentialRules {
    pub(crate) lifetime: Duration,
    pub(crate) token: Option<String>,
    pub(crate) origins: Vec<String>,
    pub(crate) per_minute: u32,
    pub(crate) proxy_header: Option<HeaderName>,
}

/// Why somebody gets no credentials.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    NoToken,
    TooOften,
}

impl TurnCredentials {
    pub(crate) fn new(servers: Arc<TurnServers>, secret: String, rules: CredentialRules) -> Self {
        let quota = std::num::NonZeroU32::new(rules.per_minute).map(Quota::per_minute);
        Self {
            servers,
            secret,
            lifetime: rules.lifetime,
            token: rules.token,
            origins: rules.origins,
            proxy_header: rules.proxy_header,
            rate: quota.map(RateLimiter::keyed),
        }
    }

    pub(crate) fn routes(self: Arc<Self>) -> Router {
        Router::new().route("/turn-credentials", get(page).options(preflight)).with_state(self)
    }

    /// Whether a request may have credentials.
    pub(crate) fn admits(&self, client: SocketAddr, headers: &HeaderMap) -> Result<(), Denied> {
        if let Some(rate) = &self.rate {
            if rate.len() > 10_000 {
                rate.retain_recent();
            }
            let origin = Origin::of(relay::client_address(client, headers, self.proxy_header.as_ref()));
            // Behind a proxy that does not say for whom it speaks, everybody comes from loopback.
            if self.proxy_header.is_some() || !origin.is_loopback() {
                rate.check_key(&origin).map_err(|_| Denied::TooOften)?;
            }
        }
        let Some(token) = &self.token else { return Ok(()) };
        let shown = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
        let shown = shown.and_then(|value| value.strip_prefix("Bearer ")).unwrap_or_default();
        if same(shown.as_bytes(), token.as_bytes()) { Ok(()) } else { Err(Denied::NoToken) }
    }

    /// The entries of an `RTCPeerConnection`'s `iceServers`, for an app in a region: where to ask for one's own address,
    /// and the TURN servers.
    pub(crate) fn ice_servers(&self, region: Option<&str>, now: SystemTime) -> Value {
        self.document(region, now)["iceServers"].take()
    }

    fn document(&self, region: Option<&str>, now: SystemTime) -> Value {
        let places = self.servers.best(region, Instant::now());
        let Minted { username, password } = mint(&self.secret, NAME, now, self.lifetime);
        let stun = places.first().map(|nearest| json!({ "urls": [nearest.stun_uri()] }));
        let turn = places
            .iter()
            .map(|place| json!({ "urls": place.turn_uris(), "username": username, "credential": password }));
        json!({
            "username": username,
            "password": password,
            "ttl": self.lifetime.as_secs(),
            "uris": places.iter().flat_map(TurnPlace::turn_uris).collect::<Vec<_>>(),
            "iceServers": stun.into_iter().chain(turn).collect::<Vec<_>>(),
        })
    }

    /// The header that lets a page of `origin` read the answer.
    fn cross_origin(&self, headers: &HeaderMap) -> Option<HeaderValue> {
        if self.origins.iter().any(|allowed| allowed == "*") {
            return Some(HeaderValue::from_static("*"));
        }
        let origin = headers.get(header::ORIGIN)?;
        self.origins.iter().any(|allowed| allowed.as_bytes() == origin.as_bytes()).then(|| origin.clone())
    }

    fn with_cross_origin(&self, headers: &HeaderMap, answer: impl IntoResponse) -> Response {
        let mut answer = answer.into_response();
        answer.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        answer.headers_mut().insert(header::VARY, HeaderValue::from_static("origin"));
        if let Some(origin) = self.cross_origin(headers) {
            answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, origin);
        }
        answer
    }
}

/// The region that a request names: `?region=eu`.
pub(crate) fn region_of(uri: &Uri) -> Option<&str> {
    uri.query()?.split('&').find_map(|pair| pair.strip_prefix("region=")).filter(|region| !region.is_empty())
}

/// Compares without telling by the time it takes where a difference is.
pub(crate) fn same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len()
        && one.iter().zip(other).fold(0, |difference, (one, other)| difference | (one ^ other)) == 0
}

impl IntoResponse for Denied {
    fn into_response(self) -> Response {
        match self {
            Self::NoToken => {
                (StatusCode::UNAUTHORIZED, [(header::WWW_AUTHENTICATE, "Bearer")], "a bearer token is needed\n")
                    .into_response()
            }
            Self::TooOften => (StatusCode::TOO_MANY_REQUESTS, "too often, wait a minute\n").into_response(),
        }
    }
}

async fn page(
    State(credentials): State<Arc<TurnCredentials>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let answer = match credentials.admits(client, &headers) {
        Ok(()) => Json(credentials.document(region_of(&uri), SystemTime::now())).into_response(),
        Err(denied) => denied.into_response(),
    };
    credentials.with_cross_origin(&headers, answer)
}

/// What a browser asks before it shows a token to another origin.
async fn preflight(State(credentials): State<Arc<TurnCredentials>>, headers: HeaderMap) -> Response {
    let allowed =
        [(header::ACCESS_CONTROL_ALLOW_HEADERS, "authorization"), (header::ACCESS_CONTROL_ALLOW_METHODS, "GET")];
    credentials.with_cross_origin(&headers, (StatusCode::NO_CONTENT, allowed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::turn_servers::TurnServer;

    fn credentials(rules: CredentialRules) -> TurnCredentials {
        let place = TurnPlace { host: "turn.example.com".into(), port: 3478, tls_port: Some(5349) };
        let server = TurnServer { place, region: None, weight: 1 };
        TurnCredentials::new(Arc::new(TurnServers::new(vec![server], None, None)), "north".into(), rules)
    }

    fn rules() -> CredentialRules {
        CredentialRules {
            lifetime: Duration::from_secs(600),
            token: None,
            origins: vec!["*".into()],
            per_minute: 5,
            proxy_header: None,
        }
    }

    fn client(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn an_app_is_told_all_ways_to_the_server_and_no_secret() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let document = credentials(rules()).document(None, now);
        assert_eq!(document["username"], "1600:app");
        assert_eq!(document["ttl"], 600);
        let uris = [
            "turn:turn.example.com:3478?transport=udp",
            "turn:turn.example.com:3478?transport=tcp",
            "turns:turn.example.com:5349?transport=tcp",
        ];
        assert_eq!(document["uris"], json!(uris));
        assert_eq!(document["iceServers"][0]["urls"], json!(["stun:turn.example.com:3478"]));
        assert_eq!(document["iceServers"][1]["credential"], document["password"]);
        assert!(!document.to_string().contains("north"));
    }

    #[test]
    fn a_region_is_named_in_the_query() {
        let region = |path: &str| region_of(&path.parse().unwrap()).map(str::to_owned);
        assert_eq!(region("/turn-credentials?a=b&region=eu-1"), Some("eu-1".into()));
        for none in ["/turn-credentials", "/turn-credentials?region=", "/turn-credentials?regions=eu"] {
            assert_eq!(region(none), None);
        }
    }

    #[test]
    fn one_address_gets_so_many_a_minute_and_others_their_own() {
        let credentials = credentials(rules());
        let none = HeaderMap::new();
        for _ in 0..5 {
            assert_eq!(credentials.admits(client("192.0.2.1:1"), &none), Ok(()));
        }
        assert_eq!(credentials.admits(client("192.0.2.1:2"), &none), Err(Denied::TooOften));
        assert_eq!(credentials.admits(client("192.0.2.2:1"), &none), Ok(()));
        for port in 0..5 {
            assert_eq!(credentials.admits(client(&format!("[2001:db8::{port}]:1")), &none), Ok(()));
        }
        assert_eq!(credentials.admits(client("[2001:db8::9]:1"), &none), Err(Denied::TooOften));
        // A proxy on this machine speaks for many, and unless it says for whom, for all of them.
        for _ in 0..20 {
            assert_eq!(credentials.admits(client("127.0.0.1:1"), &none), Ok(()));
        }
    }

    #[test]
    fn a_token_is_asked_for_when_set() {
        let credentials = credentials(CredentialRules { token: Some("open sesame".into()), per_minute: 0, ..rules() });
        let with = |value: &str| HeaderMap::from_iter([(header::AUTHORIZATION, value.parse().unwrap())]);
        assert_eq!(credentials.admits(client("192.0.2.1:1"), &with("Bearer open sesame")), Ok(()));
        for wrong in ["Bearer open", "Bearer open sesamE", "open sesame", "Basic open sesame", ""] {
            assert_eq!(credentials.admits(client("192.0.2.1:1"), &with(wrong)), Err(Denied::NoToken), "{wrong}");
        }
        assert_eq!(credentials.admits(client("192.0.2.1:1"), &HeaderMap::new()), Err(Denied::NoToken));
    }

    #[test]
    fn pages_of_other_origins_may_read_only_what_is_set() {
        let credentials = credentials(CredentialRules { origins: vec!["https://app.example.com".into()], ..rules() });
        let from = |origin: &'static str| HeaderMap::from_iter([(header::ORIGIN, HeaderValue::from_static(origin))]);
        let allowed = credentials.cross_origin(&from("https://app.example.com"));
        assert_eq!(allowed, Some(HeaderValue::from_static("https://app.example.com")));
        assert_eq!(credentials.cross_origin(&from("https://evil.example.com")), None);
        assert_eq!(credentials.cross_origin(&HeaderMap::new()), None);
    }
}
