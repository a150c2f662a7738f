//! A client that speaks to a relay over a socket, and says what it hears.

use std::time::Duration;

use futures_util::{SinkExt as _, StreamExt as _};
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use relay::Server;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Error, Message};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// Nothing that a test awaits takes nearly so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) struct Client(pub(crate) WebSocketStream<MaybeTlsStream<TcpStream>>);

impl Client {
    pub(crate) async fn connect(server: &Server) -> Self {
        let (socket, _) = tokio_tungstenite::connect_async(format!("ws://{}/", server.address())).await.unwrap();
        Self(socket)
    }

    pub(crate) async fn say(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).await.unwrap();
    }

    pub(crate) async fn frame(&mut self) -> Option<Result<Message, Error>> {
        tokio::time::timeout(PATIENCE, self.0.next()).await.expect("the relay stays silent")
    }

    pub(crate) async fn hear(&mut self) -> Value {
        loop {
            match self.frame().await.unwrap().unwrap() {
                Message::Text(text) => return serde_json::from_str(&text).unwrap(),
                Message::Ping(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    /// Everything that is on its way to this client has arrived when the answer to this has.
    pub(crate) async fn hear_all(&mut self) -> Vec<Value> {
        self.say(json!(["REQ", "marker", { "kinds": [1] }])).await;
        let mut heard = Vec::new();
        loop {
            match self.hear().await {
                message if message == json!(["EOSE", "marker"]) => return heard,
                message => heard.push(message),
            }
        }
    }

    pub(crate) async fn subscribe(&mut self, id: &str, filter: Value) {
        self.say(json!(["REQ", id, filter])).await;
        assert_eq!(self.hear().await, json!(["EOSE", id]));
    }
}

/// An event with a topic, by an author of its own.
pub(crate) fn event(kind: u16, topic: &str, content: &str) -> Value {
    let event = EventBuilder::new(Kind::from(kind), content)
        .tag(Tag::parse(["x", topic]).unwrap())
        .finalize(&Keys::generate())
        .unwrap();
    serde_json::to_value(event).unwrap()
}
