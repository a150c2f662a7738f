//! `/client-config.json`: what an app needs to use this server, ready for `gdb(name, {rtc})`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::SystemTime;

use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use crate::turn_credentials::{TurnCredentials, region_of};

/// What is known of the services when the relay starts.
#[derive(Clone)]
pub(crate) struct ClientConfig {
    /// The relay's address for apps, when it is set.
    pub(crate) relay_url: Option<String>,
    /// Where the relay listens, to fall back on.
    pub(crate) relay_listen: SocketAddr,
    /// Whether clients come with TLS.
    pub(crate) tls: bool,
    /// Credentials for TURN, if there is a secret to make them with.
    pub(crate) turn: Option<Arc<TurnCredentials>>,
}

impl ClientConfig {
    /// The pages, to be served by the relay.
    pub(crate) fn routes(self) -> Router {
        let credentials = self.turn.clone().map(TurnCredentials::routes).unwrap_or_default();
        Router::new().route("/client-config.json", get(page)).with_state(Arc::new(self)).merge(credentials)
    }

    /// The configuration for a client that reached the relay as `host`.
    fn document(&self, host: Option<&str>, turn: Value) -> Value {
        let scheme = if self.tls { "wss" } else { "ws" };
        let relay = match (&self.relay_url, host) {
            (Some(url), _) => url.clone(),
            (None, Some(host)) => format!("{scheme}://{host}"),
            (None, None) => format!("{scheme}://{}", self.relay_listen),
        };
        json!({ "relayUrls": [relay], "turnConfig": turn })
    }
}

async fn page(
    State(config): State<Arc<ClientConfig>>,
    ConnectInfo(client): ConnectInfo<SocketAddr>,
    uri: Uri,
    headers: HeaderMap,
) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).filter(|host| is_host(host));
    let cross_origin = [(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"), (header::CACHE_CONTROL, "no-store")];
    // Whoever gets no credentials still learns of the relay.
    let turn = match &config.turn {
        Some(turn) if turn.admits(client, &headers).is_ok() => turn.ice_servers(region_of(&uri), SystemTime::now()),
        _ => json!([]),
    };
    (cross_origin, Json(config.document(host, turn))).into_response()
}

/// Whether text is a host with or without a port, and nothing else.
pub(crate) fn is_host(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
    (1..=255).contains(&text.len()) && text.bytes().all(allowed)
}

/// An address as it stands in a URL.
pub(crate) fn printed(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_is_told_of_the_relay_as_it_reached_it() {
        let relay_listen = "127.0.0.1:8080".parse().unwrap();
        let config = ClientConfig { relay_url: None, relay_listen, tls: false, turn: None };
        let document = config.document(Some("relay.example.com:8080"), json!([]));
        assert_eq!(document, json!({ "relayUrls": ["ws://relay.example.com:8080"], "turnConfig": [] }));
        let with_tls = ClientConfig { tls: true, ..config.clone() };
        assert_eq!(with_tls.document(Some("a.example"), json!([]))["relayUrls"], json!(["wss://a.example"]));
        let public = ClientConfig { relay_url: Some("wss://relay.example.com".into()), ..config };
        assert_eq!(public.document(Some("other"), json!([]))["relayUrls"], json!(["wss://relay.example.com"]));
    }

    #[test]
    fn only_a_host_is_taken_for_a_host() {
        assert!(is_host("localhost:8080") && is_host("[::1]:8080"));
        for wrong in ["", "a b", "a/b", "a\"b", "x@y"] {
            assert!(!is_host(wrong), "{wrong}");
        }
    }
}
