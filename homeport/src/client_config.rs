//! `/client-config.json`: what an app needs to use this server, ready for `gdb(name, {rtc})`.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};
use turn_server::mint;

/// How long credentials are good: longer than a tab is usually open.
const CREDENTIAL_LIFETIME: Duration = Duration::from_secs(24 * 60 * 60);

/// What is known of the services when the relay starts.
#[derive(Clone)]
pub(crate) struct ClientConfig {
    /// The relay's address for apps, when it is set.
    pub(crate) relay_url: Option<String>,
    /// Where the relay listens, to fall back on.
    pub(crate) relay_listen: SocketAddr,
    /// Where TURN is, and the secret that mints credentials for it.
    pub(crate) turn: Option<(SocketAddr, String)>,
}

impl ClientConfig {
    /// The page, to be served by the relay.
    pub(crate) fn routes(self) -> Router {
        Router::new().route("/client-config.json", get(page)).with_state(Arc::new(self))
    }

    /// The configuration for a client that reached the relay as `host`.
    fn document(&self, host: Option<&str>, now: SystemTime) -> Value {
        let relay = match (&self.relay_url, host) {
            (Some(url), _) => url.clone(),
            (None, Some(host)) => format!("ws://{host}"),
            (None, None) => format!("ws://{}", self.relay_listen),
        };
        let turn: Vec<Value> = self
            .turn
            .iter()
            .flat_map(|(address, secret)| {
                let minted = mint(secret, "app", now, CREDENTIAL_LIFETIME);
                let host = printed(address.ip());
                let port = address.port();
                [
                    json!({ "urls": [format!("stun:{host}:{port}")] }),
                    json!({
                        "urls": [format!("turn:{host}:{port}?transport=udp")],
                        "username": minted.username,
                        "credential": minted.password,
                    }),
                ]
            })
            .collect();
        json!({ "relayUrls": [relay], "turnConfig": turn })
    }
}

async fn page(State(config): State<Arc<ClientConfig>>, headers: HeaderMap) -> Response {
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).filter(|host| is_host(host));
    let cross_origin = [(header::ACCESS_CONTROL_ALLOW_ORIGIN, "*"), (header::CACHE_CONTROL, "no-store")];
    (cross_origin, Json(config.document(host, SystemTime::now()))).into_response()
}

/// Whether text is a host with or without a port, and nothing else.
fn is_host(text: &str) -> bool {
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
    fn a_client_is_told_of_relay_and_turn_as_it_reached_them() {
        let config = ClientConfig {
            relay_url: None,
            relay_listen: "127.0.0.1:8080".parse().unwrap(),
            turn: Some(("[2001:db8::1]:3478".parse().unwrap(), "north".into())),
        };
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let document = config.document(Some("relay.example.com:8080"), now);
        assert_eq!(document["relayUrls"], json!(["ws://relay.example.com:8080"]));
        assert_eq!(document["turnConfig"][1]["urls"], json!(["turn:[2001:db8::1]:3478?transport=udp"]));
        assert_eq!(document["turnConfig"][1]["username"], "87400:app");
        assert!(!document.to_string().contains("north"));
        let public = ClientConfig { relay_url: Some("wss://relay.example.com".into()), ..config };
        assert_eq!(public.document(Some("other"), now)["relayUrls"], json!(["wss://relay.example.com"]));
    }

    #[test]
    fn only_a_host_is_taken_for_a_host() {
        assert!(is_host("localhost:8080") && is_host("[::1]:8080"));
        for wrong in ["", "a b", "a/b", "a\"b", "x@y"] {
            assert!(!is_host(wrong), "{wrong}");
        }
    }
}
