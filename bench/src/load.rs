//! Clients that announce themselves in rooms, with events that were signed beforehand.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::stream::{SplitSink, SplitStream};
use futures_util::{SinkExt as _, StreamExt as _};
use nostr::event::FinalizeEvent as _;
use nostr::prelude::{EventBuilder, Keys, Kind, Tag, Timestamp};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// What a run is made of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    pub(crate) connections: usize,
    /// Clients that share a topic.
    pub(crate) room: usize,
    /// Events of each client.
    pub(crate) events: usize,
    /// Time between two events of a client; `None`: the next goes out when the last was acknowledged.
    pub(crate) every: Option<Duration>,
    /// Bytes of padding in an event; 0 makes it an announce.
    pub(crate) padding: usize,
}

/// What came of a run.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Outcome {
    pub(crate) seconds: f64,
    pub(crate) published: u64,
    pub(crate) delivered: u64,
    /// Clients that the relay hung up on.
    pub(crate) cut: u64,
    /// From sending to receiving, in ms.
    pub(crate) p50_ms: f64,
    pub(crate) p99_ms: f64,
}

const KIND: u16 = 22_000;

/// When each event was sent, in ns since the start, found by the event's id.
struct Ledger {
    start: Instant,
    index: HashMap<String, usize>,
    sent: Vec<AtomicU64>,
}

struct Client {
    topic: String,
    /// Each with its place in the ledger.
    events: Vec<(usize, Utf8Bytes)>,
}

/// Signs what all clients will say.
fn prepare(shape: Shape) -> anyhow::Result<(Vec<Client>, Ledger)> {
    let mut index = HashMap::new();
    let mut clients = Vec::with_capacity(shape.connections);
    let now = Timestamp::now().as_secs();
    for number in 0..shape.connections {
        let keys = Keys::generate();
        let topic = format!("bench-room-{}", number / shape.room);
        let mut events = Vec::with_capacity(shape.events);
        for count in 0..shape.events {
            let content = if shape.padding == 0 {
                format!(r#"{{"peerId":"{number:020}"}}"#)
            } else {
                format!(r#"{{"peerId":"{number:020}","offer":"{}"}}"#, "x".repeat(shape.padding))
            };
            // A second apart: two announces of one second would be one event.
            let event = EventBuilder::new(Kind::from(KIND), content)
                .tag(Tag::parse(["x", topic.as_str()])?)
                .custom_created_at(Timestamp::from(now - u64::try_from(shape.events - count)?))
                .finalize(&keys)?;
            let place = index.len();
            index.insert(event.id.to_hex(), place);
            events.push((place, Utf8Bytes::from(serde_json::json!(["EVENT", event]).to_string())));
        }
        clients.push(Client { topic, events });
    }
    let sent = (0..index.len()).map(|_| AtomicU64::new(0)).collect();
    Ok((clients, Ledger { start: Instant::now(), index, sent }))
}

/// Connects without a word.
async fn connect(url: &str) -> anyhow::Result<Socket> {
    let (socket, _) = tokio_tungstenite::connect_async_with_config(url, None, true).await.context("cannot connect")?;
    Ok(socket)
}

/// Connects, and subscribes to a topic.
pub(crate) async fn subscribe(url: &str, topic: &str) -> anyhow::Result<Socket> {
    let mut socket = connect(url).await?;
    let filter = serde_json::json!({ "kinds": [KIND], "#x": [topic] });
    socket.send(Message::text(serde_json::json!(["REQ", "s".repeat(64), filter]).to_string())).await?;
    while let Some(message) = socket.next().await {
        if matches!(message?, Message::Text(text) if text.starts_with(r#"["EOSE""#)) {
            return Ok(socket);
        }
    }
    anyhow::bail!("the relay hung up")
}

/// Runs a shape against the relay at `url`; `before` is called when everybody is connected and nobody has spoken.
pub(crate) async fn run(url: &str, shape: Shape, before: impl FnOnce()) -> anyhow::Result<Outcome> {
    run_when(&[url], shape, async {
        before();
        Ok(())
    })
    .await
}

/// Runs a shape against several relays, the clients of a room in turn at each of them; nobody speaks before `ready`.
pub(crate) async fn run_when(
    urls: &[&str],
    shape: Shape,
    ready: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<Outcome> {
    let (clients, mut ledger) = prepare(shape)?;
    let mut sockets = Vec::with_capacity(clients.len());
    for (client, url) in clients.iter().zip(urls.iter().cycle()) {
        sockets.push(subscribe(url, &client.topic).await?);
    }
    ready.await?;
    ledger.start = Instant::now();
    let ledger = Arc::new(ledger);
    let published = u64::try_from(shape.connections * shape.events)?;
    let mut tasks = Vec::new();
    for (number, (client, socket)) in clients.into_iter().zip(sockets).enumerate() {
        let ledger = Arc::clone(&ledger);
        // Spread over the period, as real clients are.
        let phase = shape.every.map(|every| every.mul_f64((number as f64 * 0.618_034).fract()));
        tasks.push(tokio::spawn(converse(client, socket, ledger, shape.every, phase)));
    }
    let mut latencies: Vec<u32> = Vec::new();
    let mut finished = Duration::ZERO;
    let mut cut = 0;
    for task in tasks {
        let heard = task.await?;
        latencies.extend(heard.latencies);
        finished = finished.max(heard.last);
        if let Err(error) = heard.end {
            cut += 1;
            if cut == 1 {
                eprintln!("a client was cut off, others may follow: {error:#}");
            }
        }
    }
    latencies.sort_unstable();
    let quantile = |share: f64| {
        let index = (latencies.len() as f64 * share) as usize;
        latencies.get(index.min(latencies.len().saturating_sub(1))).map_or(0.0, |us| f64::from(*us) / 1000.0)
    };
    Ok(Outcome {
        seconds: finished.as_secs_f64(),
        published,
        delivered: u64::try_from(latencies.len())?,
        cut,
        p50_ms: quantile(0.5),
        p99_ms: quantile(0.99),
    })
}

/// A calm room of ten, and, if `flooded`, one connection that says 20,000 events elsewhere as fast as it can. Also, how
/// many of those were refused.
pub(crate) async fn beside_a_flood(url: &str, flooded: bool) -> anyhow::Result<(Outcome, u64)> {
    const FLOOD: usize = 20_000;
    let calm = Shape { connections: 10, room: 10, events: 40, every: Some(Duration::from_millis(250)), padding: 0 };
    let flood = async {
        if !flooded {
            return anyhow::Ok(0);
        }
        let keys = Keys::generate();
        let mut messages = Vec::with_capacity(FLOOD);
        for number in 0..FLOOD {
            let event = EventBuilder::new(Kind::from(KIND), format!("flood {number}"))
                .tag(Tag::parse(["x", "elsewhere"])?)
                .finalize(&keys)?;
            messages.push(Message::text(serde_json::json!(["EVENT", event]).to_string()));
        }
        let (mut sink, mut stream) = connect(url).await?.split();
        let saying = tokio::spawn(async move {
            for message in messages {
                // Refusing to listen any longer is a relay's right.
                if sink.send(message).await.is_err() {
                    return sink;
                }
            }
            sink
        });
        let (mut answers, mut refused) = (0, 0);
        while answers < FLOOD
            && let Some(Ok(message)) = stream.next().await
        {
            if let Message::Text(text) = message
                && text.starts_with(r#"["OK""#)
            {
                answers += 1;
                refused += u64::from(text.contains(",false,"));
            }
        }
        drop(saying.await?);
        Ok(refused)
    };
    let (calm, refused) = tokio::join!(run(url, calm, || ()), flood);
    Ok((calm?, refused?))
}

/// What one client heard.
struct Heard {
    /// From sending to receiving, in µs.
    latencies: Vec<u32>,
    /// When it last heard something.
    last: Duration,
    /// How its connection ended.
    end: anyhow::Result<()>,
}

/// Says everything a client has to say, and hears until it has been quiet for a while.
async fn converse(
    client: Client,
    socket: Socket,
    ledger: Arc<Ledger>,
    every: Option<Duration>,
    phase: Option<Duration>,
) -> Heard {
    let mut heard = Heard { latencies: Vec::new(), last: Duration::ZERO, end: Ok(()) };
    heard.end = talk(client, socket, &ledger, every, phase.unwrap_or_default(), &mut heard).await;
    heard
}

async fn talk(
    client: Client,
    socket: Socket,
    ledger: &Ledger,
    every: Option<Duration>,
    phase: Duration,
    heard: &mut Heard,
) -> anyhow::Result<()> {
    const QUIET: Duration = Duration::from_secs(3);
    let (mut sink, mut stream): (SplitSink<Socket, Message>, SplitStream<Socket>) = socket.split();
    let mut events = client.events.into_iter();
    let mut next = tokio::time::Instant::from_std(ledger.start) + phase;
    let mut acknowledged = true;
    let mut left = events.len();
    loop {
        let due = left > 0 && (every.is_some() || acknowledged);
        tokio::select! {
            () = tokio::time::sleep_until(next), if due => {
                if let Some((place, event)) = events.next() {
                    let now = u64::try_from(ledger.start.elapsed().as_nanos())?;
                    ledger.sent[place].store(now, Ordering::Relaxed);
                    sink.send(Message::Text(event)).await?;
                    left -= 1;
                    acknowledged = false;
                    next += every.unwrap_or_default();
                }
            }
            message = stream.next() => {
                let message = message.context("the relay hung up")??;
                if let Message::Text(text) = message {
                    if text.starts_with(r#"["EVENT""#) {
                        let id = text.find(r#""id":""#).and_then(|at| text.get(at + 6..at + 70)).context("no id")?;
                        let place = ledger.index.get(id).context("an event that nobody sent")?;
                        heard.last = ledger.start.elapsed();
                        let sent = Duration::from_nanos(ledger.sent[*place].load(Ordering::Relaxed));
                        let latency = heard.last.saturating_sub(sent);
                        heard.latencies.push(u32::try_from(latency.as_micros()).unwrap_or(u32::MAX));
                    } else if text.starts_with(r#"["OK""#) {
                        anyhow::ensure!(text.contains(",true,"), "refused: {text}");
                        acknowledged = true;
                    }
                }
            }
            () = tokio::time::sleep(QUIET), if left == 0 => return Ok(()),
        }
    }
}
