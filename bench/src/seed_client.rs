//! A peer on the `webrtc` crate that links with a seed and with nobody else.
#![allow(dead_code, reason = "each of its users needs another part")]

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use futures_util::{SinkExt as _, StreamExt as _};
use genosdb::frame::{Frame, Nonces};
use genosdb::{APP_ID, ChannelName, Content, Limits, Message, PeerId, Reassembler, Room, SdpKey, Signal, Topic};
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag};
use rand::{Rng as _, RngCore as _};
use tokio::sync::{mpsc, oneshot};
use tokio_tungstenite::tungstenite::Message as Text;
use webrtc::api::APIBuilder;
use webrtc::api::setting_engine::SettingEngine;
use webrtc::data_channel::RTCDataChannel;
use webrtc::peer_connection::RTCPeerConnection;
use webrtc::peer_connection::configuration::RTCConfiguration;
use webrtc::peer_connection::sdp::session_description::RTCSessionDescription;

/// How long anything may take.
const PATIENCE: Duration = Duration::from_secs(120);
/// Senders wait while more is on its way (wire §3).
const BUFFERED_HIGH: usize = 65_535;

pub(crate) fn wall_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// An open link to a seed.
pub(crate) struct SeedLink {
    /// From the announce to the open data channel.
    pub(crate) set_up: Duration,
    connection: Arc<RTCPeerConnection>,
    channel: Arc<RTCDataChannel>,
    /// Messages of the graph's channel, and how many bytes they were on their way.
    messages: mpsc::UnboundedReceiver<(String, usize)>,
    nonces: Nonces,
}

impl Drop for SeedLink {
    fn drop(&mut self) {
        let connection = Arc::clone(&self.connection);
        tokio::spawn(async move {
            // It is over either way.
            let _ = connection.close().await;
        });
    }
}

impl SeedLink {
    /// Joins the graph room of `database`, and takes the offer of the seed that is there.
    pub(crate) async fn open(relay: &str, database: &str) -> anyhow::Result<Self> {
        tokio::time::timeout(PATIENCE, Self::try_open(relay, database)).await.context("no link in time")?
    }

    async fn try_open(relay: &str, database: &str) -> anyhow::Result<Self> {
        let room = Room::graph_sync(database);
        let key = SdpKey::derive("", APP_ID, &room);
        // A lesser id than any seed's, which starts with z: the seed's offer stands.
        let us = PeerId::generate(|range| rand::rng().random_range(0..range.end / 2));
        let (mut socket, _) = tokio_tungstenite::connect_async(relay).await?;
        let keys = Keys::generate();
        let own = room.self_topic(&us);
        let request = serde_json::json!(["REQ", "own", {"kinds": [own.kind()], "#x": [own.as_str()]}]);
        socket.send(Text::text(request.to_string())).await?;
        let start = Instant::now();
        socket.send(sign(&keys, &room.root_topic(), &Signal::Announce { peer: us })?).await?;
        let (connection, opened, messages) = peer().await?;
        while let Some(message) = socket.next().await {
            let Text::Text(text) = message? else { continue };
            let value: serde_json::Value = serde_json::from_str(&text)?;
            let Some(signal) = value[2]["content"].as_str().filter(|_| value[0] == "EVENT").and_then(Signal::parse)
            else {
                continue;
            };
            if let Signal::Offer { peer, sdp, superpeer: true } = signal {
                let offer = RTCSessionDescription::offer(key.open(&sdp)?)?;
                connection.set_remote_description(offer).await?;
                let answer = connection.create_answer(None).await?;
                let mut gathered = connection.gathering_complete_promise().await;
                connection.set_local_description(answer).await?;
                let _ = gathered.recv().await;
                let answer = connection.local_description().await.context("no description")?.sdp;
                let mut iv = [0; 12];
                rand::rng().fill_bytes(&mut iv);
                let sdp = key.seal(iv, &answer);
                socket.send(sign(&keys, &room.self_topic(&peer), &Signal::Answer { peer: us, sdp })?).await?;
                let channel = opened.await?;
                return Ok(Self { set_up: start.elapsed(), connection, channel, messages, nonces: Nonces::default() });
            }
        }
        bail!("the relay closed the connection")
    }

    /// Sends a message of operations.
    pub(crate) async fn send(&mut self, text: &str) -> anyhow::Result<()> {
        let message = Message::new(ChannelName::SYNC_GRAPH, Content::Json(text.to_owned()));
        let nonce = self.nonces.next(ChannelName::SYNC_GRAPH);
        for index in 0..message.frames() {
            while self.channel.buffered_amount().await > BUFFERED_HIGH {
                tokio::time::sleep(Duration::from_micros(500)).await;
            }
            self.channel.send(&message.frame(nonce, index).into()).await?;
        }
        Ok(())
    }

    /// The next message of the graph's channel; `None` once the link is closed.
    pub(crate) async fn message(&mut self) -> Option<String> {
        self.messages.recv().await.map(|(text, _)| text)
    }

    /// Waits for a whole state; returns its text, and its bytes on their way.
    pub(crate) async fn state(&mut self) -> anyhow::Result<(String, usize)> {
        let next = async {
            while let Some((text, bytes)) = self.messages.recv().await {
                if text.starts_with(r#"[{"type":"fullStateSync""#) {
                    return Some((text, bytes));
                }
            }
            None
        };
        tokio::time::timeout(PATIENCE, next).await.context("no state in time")?.context("the link closed")
    }
}

fn sign(keys: &Keys, topic: &Topic, signal: &Signal) -> anyhow::Result<Text> {
    let event = EventBuilder::new(Kind::from(topic.kind()), signal.to_content())
        .tag(Tag::parse(["x", topic.as_str()])?)
        .finalize(keys)?;
    Ok(Text::text(serde_json::json!(["EVENT", event]).to_string()))
}

type Opened = oneshot::Receiver<Arc<RTCDataChannel>>;

async fn peer() -> anyhow::Result<(Arc<RTCPeerConnection>, Opened, mpsc::UnboundedReceiver<(String, usize)>)> {
    // The crate asks for the process's provider; the second peer finds it there.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let mut settings = SettingEngine::default();
    settings.set_include_loopback_candidate(true);
    settings.set_ice_multicast_dns_mode(webrtc::ice::mdns::MulticastDnsMode::Disabled);
    let api = APIBuilder::new().with_setting_engine(settings).build();
    let connection = Arc::new(api.new_peer_connection(RTCConfiguration::default()).await?);
    let (opened, open) = oneshot::channel();
    let (messages, received) = mpsc::unbounded_channel();
    let opened = std::sync::Mutex::new(Some((opened, messages)));
    connection.on_data_channel(Box::new(move |channel| {
        let Some((opened, messages)) = opened.lock().ok().and_then(|mut opened| opened.take()) else {
            return Box::pin(async {});
        };
        watch(&channel, messages);
        let opening = Arc::clone(&channel);
        channel.on_open(Box::new(move || {
            // Who waited may have given up.
            let _ = opened.send(opening);
            Box::pin(async {})
        }));
        Box::pin(async {})
    }));
    Ok((connection, open, received))
}

/// Answers pings, and hands on the graph's messages.
fn watch(channel: &Arc<RTCDataChannel>, messages: mpsc::UnboundedSender<(String, usize)>) {
    let limits = Limits { message_bytes: 1 << 30, unfinished_bytes: 1 << 30, ..Limits::default() };
    let state = std::sync::Mutex::new((Reassembler::new(limits), 0));
    let pong = Arc::clone(channel);
    channel.on_message(Box::new(move |message| {
        let whole = state.lock().ok().and_then(|mut state| {
            let (reassembler, bytes) = &mut *state;
            *bytes += message.data.len();
            let whole = reassembler.push(&Frame::parse(&message.data).ok()?).ok()??;
            Some((whole, std::mem::take(bytes)))
        });
        let pong = Arc::clone(&pong);
        match whole {
            Some(((ChannelName::PING, _), _)) => {
                return Box::pin(async move {
                    // A link that has just closed says so by itself.
                    let _ = pong.send(&Message::empty(ChannelName::PONG).frame(0, 0).into()).await;
                });
            }
            Some(((ChannelName::SYNC_GRAPH, Content::Json(text)), bytes)) => {
                // Nobody may be listening any more.
                let _ = messages.send((text, bytes));
            }
            _ => {}
        }
        Box::pin(async {})
    }));
}
