//! A client of a relay that tries it out: a word there and back, and a description to the seed and its answer.

use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::{SinkExt as _, StreamExt as _};
use genosdb::PeerId;
use rustls::ClientConfig;
use seed_peer::{CheckRoom, RelayKey};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{Connector, MaybeTlsStream, WebSocketStream};

/// The largest message of a relay that is looked at.
const MAX_MESSAGE: usize = 128 << 10;
/// How often the seed is asked again: it may just be coming.
const ASK_AGAIN: Duration = Duration::from_secs(3);

/// Who meets, and where.
#[derive(Clone)]
pub(crate) struct MeetingPlace {
    /// The relay's address, `ws://` or `wss://`.
    pub(crate) url: String,
    /// Whom to trust with `wss://`.
    pub(crate) tls: Arc<ClientConfig>,
    /// Proves who we are to a relay that asks.
    pub(crate) key: RelayKey,
    pub(crate) room: CheckRoom,
    /// How long each step may take.
    pub(crate) patience: Duration,
}

/// Why nobody was met.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MeetingError {
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    #[error("the connection ended: {0}")]
    Ended(String),
    #[error("it refuses: {0}")]
    Refused(String),
    #[error("it takes connections, but there is no answer")]
    Silent,
    #[error("no seed peer answers there")]
    NoSeed,
}

/// A connection to a relay on which a word has come back.
pub(crate) struct Meeting {
    place: MeetingPlace,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    peer: PeerId,
}

impl Meeting {
    /// Connects, and sends a word to itself. Returns how long that was on its way.
    pub(crate) async fn join(place: MeetingPlace) -> Result<(Self, Duration), MeetingError> {
        let limits = WebSocketConfig::default().max_message_size(Some(MAX_MESSAGE)).max_frame_size(Some(MAX_MESSAGE));
        let tls = Some(Connector::Rustls(Arc::clone(&place.tls)));
        let connecting = tokio_tungstenite::connect_async_tls_with_config(place.url.as_str(), Some(limits), true, tls);
        let (socket, _) = match timeout(place.patience, connecting).await {
            Ok(connected) => connected.map_err(|error| MeetingError::Unreachable(error.to_string()))?,
            Err(_) => return Err(MeetingError::Unreachable("it does not answer".into())),
        };
        let mut meeting = Self { peer: CheckRoom::new_peer(), socket, place };
        let patience = meeting.place.patience;
        let echoed = timeout(patience, meeting.echo()).await.unwrap_or(Err(MeetingError::Silent))?;
        Ok((meeting, echoed))
    }

    async fn echo(&mut self) -> Result<Duration, MeetingError> {
        self.subscribe().await?;
        let mut said = None;
        loop {
            let message = self.hear().await?;
            match (message[0].as_str(), &message[1], &message[2]) {
                (Some("AUTH"), Value::String(challenge), _) => {
                    let proof = self.place.key.auth_message(&self.place.url, challenge);
                    self.say(proof.map_err(|error| MeetingError::Refused(error.to_string()))?).await?;
                }
                // The proof counts, or not; what was refused for want of it is asked once more.
                (Some("OK"), _, Value::Bool(true)) if said.is_none() => self.subscribe().await?,
                (Some("OK"), _, Value::Bool(false)) => return Err(refused(&message[3])),
                (Some("CLOSED"), _, reason) if !is_auth(reason) => return Err(refused(reason)),
                (Some("EOSE"), Value::String(name), _) if name == "own" && said.is_none() => {
                    let word = json!({ "peerId": self.peer.as_str(), "echo": 1 }).to_string();
                    said = Some((word.clone(), Instant::now()));
                    self.publish(&word).await?;
                }
                (Some("EVENT"), _, event) => {
                    if let Some((word, at)) = &said
                        && event["content"] == **word
                    {
                        return Ok(at.elapsed());
                    }
                }
                _ => {}
            }
        }
    }

    /// Asks the seed to answer a description. Returns its answer.
    pub(crate) async fn ask(&mut self, sdp: &str) -> Result<String, MeetingError> {
        let own = self.place.room.self_topic(&self.peer).as_str().to_owned();
        let patience = self.place.patience;
        let asking = async {
            loop {
                let offer = self.place.room.offer(self.peer, sdp);
                self.publish(&offer).await?;
                let hearing = async {
                    loop {
                        let message = self.hear().await?;
                        let event = &message[2];
                        let is_ours = event["tags"][0][1] == own;
                        if message[0] == "EVENT"
                            && is_ours
                            && let Some((_, answer)) =
                                event["content"].as_str().and_then(|content| self.place.room.parse_answer(content))
                        {
                            return Ok(answer);
                        }
                    }
                };
                if let Ok(heard) = timeout(ASK_AGAIN, hearing).await {
                    return heard;
                }
            }
        };
        timeout(patience, asking).await.unwrap_or(Err(MeetingError::NoSeed))
    }

    /// Leaves in order.
    pub(crate) async fn leave(mut self) {
        // It was a try; who does not take the goodbye is left without.
        let _ = timeout(Duration::from_secs(1), self.socket.close(None)).await;
    }

    async fn subscribe(&mut self) -> Result<(), MeetingError> {
        let topics = [self.place.room.self_topic(&self.peer), self.place.room.root_topic()];
        for (name, topic) in ["seed", "own"].into_iter().zip(topics) {
            self.say(json!(["REQ", name, { "kinds": [topic.kind()], "#x": [topic.as_str()] }]).to_string()).await?;
        }
        Ok(())
    }

    async fn publish(&mut self, content: &str) -> Result<(), MeetingError> {
        let topic = self.place.room.root_topic();
        let message = self.place.key.event_message(topic.kind(), topic.as_str(), content);
        self.say(message.map_err(|error| MeetingError::Refused(error.to_string()))?).await
    }

    async fn say(&mut self, text: String) -> Result<(), MeetingError> {
        self.socket.send(Message::text(text)).await.map_err(ended)
    }

    async fn hear(&mut self) -> Result<Value, MeetingError> {
        loop {
            match self.socket.next().await {
                Some(Ok(Message::Text(text))) => {
                    if let Ok(message @ Value::Array(_)) = serde_json::from_str(&text) {
                        return Ok(message);
                    }
                }
                Some(Ok(Message::Close(_))) | None => return Err(MeetingError::Ended("the relay closed it".into())),
                Some(Ok(_)) => {}
                Some(Err(error)) => return Err(ended(error)),
            }
        }
    }
}

fn ended(error: Error) -> MeetingError {
    MeetingError::Ended(error.to_string())
}

fn is_auth(reason: &Value) -> bool {
    reason.as_str().is_some_and(|reason| reason.starts_with("auth-required"))
}

fn refused(reason: &Value) -> MeetingError {
    let reason: String = reason.as_str().unwrap_or("without a reason").chars().take(200).collect();
    MeetingError::Refused(reason.escape_debug().to_string())
}
