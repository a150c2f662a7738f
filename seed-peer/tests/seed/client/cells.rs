//! A client's part in cells, by the rules of wire §5.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

use genosdb::envelope::Letter;
use genosdb::{CellIndex, Content, Envelope, Message, PeerId, Signal, Topology};
use tokio::sync::mpsc;

use super::connection::Event;
use super::peer::Peer;

/// What a client in cells knows, by the rules of wire §5 and nothing of the seed's.
pub(super) struct CellsPeer {
    id: PeerId,
    cell_size: usize,
    pub(super) roster: BTreeSet<PeerId>,
    /// First and last change since the last seal.
    changed: Option<(Instant, Instant)>,
    sealed: Option<Instant>,
    topology: Topology,
    seen: HashSet<String>,
    sequence: u64,
    pub(super) stutters: bool,
    pub(super) lies: bool,
    pub(super) strays: Option<CellIndex>,
    /// What a stutterer still has to pass on.
    late: Vec<(PeerId, Envelope)>,
}

impl CellsPeer {
    pub(super) fn new(id: PeerId, cell_size: usize) -> Self {
        Self {
            id,
            cell_size,
            roster: BTreeSet::from([id]),
            changed: None,
            sealed: None,
            topology: Topology::new(&[id], cell_size),
            seen: HashSet::new(),
            sequence: 0,
            stutters: false,
            lies: false,
            strays: None,
            late: Vec::new(),
        }
    }

    pub(super) fn change(&mut self) {
        let now = Instant::now();
        self.changed = Some((self.changed.map_or(now, |(first, _)| first), now));
    }

    /// Whether a link with `peer` has a place; as long as the roster holds nobody else, every first contact has.
    pub(super) fn wants(&self, peer: &PeerId) -> bool {
        self.sealed.is_none() || self.topology.are_linked(&self.id, peer)
    }

    fn is_due(&self) -> bool {
        self.changed.is_some_and(|(first, last)| {
            last.elapsed() >= Duration::from_secs(2) || first.elapsed() >= Duration::from_secs(10)
        })
    }

    pub(super) fn envelope(&mut self, kind: &str, data: &str) -> Envelope {
        self.sequence += 1;
        let (id, ttl) = (self.id, self.topology.ttl());
        let cell = self.strays.unwrap_or_else(|| self.topology.cell_of(&id).unwrap());
        let cell = if self.lies { CellIndex(cell.0 + 1) } else { cell };
        let text = format!(
            r#"{{"t":"{kind}","id":"{id}:x:{}","ttl":{ttl},"data":{data},"origin":"{id}","originCell":"{cell}"}}"#,
            self.sequence
        );
        Envelope::parse(&text).unwrap()
    }

    /// The channels that this peer sends and listens on.
    fn channels(&self) -> Vec<CellIndex> {
        if self.lies {
            return (0..u32::try_from(self.topology.total_cells()).unwrap()).map(CellIndex).collect();
        }
        if let Some(cell) = self.strays {
            return vec![cell];
        }
        self.topology.channels(&self.id)
    }
}

impl Peer {
    /// Seals the roster when it is due, dials whom the topology asks for, and drops whom it has no place for.
    pub(super) async fn look_at_cells(
        &mut self,
        events: &mpsc::UnboundedSender<Event>,
    ) -> Vec<(genosdb::Topic, Signal)> {
        let mut signals = Vec::new();
        let Some(cells) = &mut self.cells else { return signals };
        let late = std::mem::take(&mut cells.late);
        let mut wanted = Vec::new();
        if cells.is_due() {
            cells.changed = None;
            let roster: Vec<PeerId> = cells.roster.iter().copied().collect();
            cells.topology = Topology::new(&roster, cells.cell_size);
            cells.sealed = Some(Instant::now());
            self.view.topology = Some(cells.topology.clone());
            wanted = cells.topology.links(&self.id);
        }
        let prunes = cells.changed.is_none() && cells.sealed.is_some_and(|at| at.elapsed() >= Duration::from_secs(5));
        let surplus: Vec<PeerId> = self
            .links
            .iter()
            .filter(|(peer, link)| prunes && link.channel.is_some() && !cells.wants(peer))
            .map(|(peer, _)| *peer)
            .collect();
        for peer in wanted {
            if !self.links.contains_key(&peer) {
                signals.push(self.dial(peer, events).await);
            }
        }
        for peer in surplus {
            if let Some(link) = self.links.get(&peer) {
                let _ = link.connection.close().await;
            }
            self.unlinked(peer);
        }
        for (from, envelope) in late.into_iter().rev() {
            self.pass_on(from, &envelope, None).await;
        }
        signals
    }

    /// Sends an envelope of this peer's own on every channel that it sends on.
    pub(super) async fn send_to_cells(&mut self, envelope: &Envelope, bytes: Option<Vec<u8>>) {
        if let Some(cells) = &mut self.cells {
            cells.seen.insert(envelope.id.to_text());
        }
        self.send_on_channels(envelope, bytes, None).await;
    }

    async fn pass_on(&mut self, from: PeerId, envelope: &Envelope, bytes: Option<Vec<u8>>) {
        if let Some(passed_on) = envelope.passed_on() {
            self.send_on_channels(&passed_on, bytes, Some(from)).await;
        }
    }

    async fn send_on_channels(&mut self, envelope: &Envelope, bytes: Option<Vec<u8>>, except: Option<PeerId>) {
        let Some(cells) = &self.cells else { return };
        let (topology, stutters) = (cells.topology.clone(), cells.stutters);
        for cell in cells.channels() {
            let content = match &bytes {
                Some(bytes) => Content::Binary { meta: Some(envelope.print()), bytes: bytes.clone() },
                None => Content::Text(envelope.print()),
            };
            let message = Message::new(cell.channel(), content);
            let audience: Vec<PeerId> = self
                .links
                .keys()
                .filter(|peer| Some(**peer) != except && topology.cell_of(peer) == Some(cell))
                .copied()
                .collect();
            for peer in audience {
                for _ in 0..1 + usize::from(stutters) {
                    self.send(peer, &message).await;
                }
            }
        }
    }

    /// A frame came on a cell's channel.
    pub(super) async fn hear_cell(&mut self, from: PeerId, cell: CellIndex, content: Content) {
        let Some(cells) = &mut self.cells else { return };
        if !cells.channels().contains(&cell) && cells.sealed.is_some() {
            return;
        }
        let (text, bytes) = match content {
            Content::Text(text) => (text, None),
            Content::Binary { meta: Some(meta), bytes } => (meta, Some(bytes)),
            other => panic!("{other:?}"),
        };
        let envelope = Envelope::parse(&text).unwrap();
        if !cells.seen.insert(envelope.id.to_text()) {
            return;
        }
        if cells.topology.is_bridge(&self.id) || cells.lies {
            if cells.stutters && bytes.is_none() {
                cells.late.push((from, envelope.clone()));
            } else {
                self.pass_on(from, &envelope, bytes.clone()).await;
            }
        }
        match envelope.letter() {
            Letter::Channel { payload, .. } => self.receive(payload.as_str()).await,
            Letter::Bare => self.view.application.push(match bytes {
                Some(bytes) => format!("{} bytes", bytes.len()),
                None => envelope.data.to_string(),
            }),
            Letter::Ping { id, target } if target == self.id => {
                let data = format!(r#"{{"pingId":{id},"receivedAt":{}}}"#, self.wall_ms());
                let pong = self.cells.as_mut().unwrap().envelope("pong", &data);
                self.send_to_cells(&pong, None).await;
            }
            Letter::Ping { .. } => {}
            Letter::Other => self.view.ponged.push(envelope.origin),
        }
    }
}
