//! How the writer takes in what peers sent: within the bounds, on the word of those who may, by the rules of merging.

use std::time::Instant;

use genosdb::Hlc;
use genosdb::graph::{News, Outcome, apply, merge};
use genosdb::operation::{FullStateSync, Link, Operation, Remove, Upsert};
use genosdb::security::{Attested, Change, unsign};
use genosdb::signature::{Address, SignatureError};
use rusqlite::params;

use super::graph::{RoomGraph, RoomState, signed};
use super::writer::Writer;
use super::{Checked, RoomKey};
use crate::security::Security;

/// What an edge is taken to weigh where counting them would cost more than adding one.
const AVERAGE_EDGE_BYTES: usize = 32;

/// On whose word a full state is taken.
#[derive(Clone, Copy)]
pub(super) enum Word<'a> {
    /// On anybody's: nobody rules the room.
    Anybodys,
    /// On that of one who signed it, as far as the room's policy goes.
    Of(&'a Security, Address),
    /// On that of one who did not sign, as far as the room lets that be.
    Unsigned(&'a Security),
    /// On nobody's.
    Nobodys(&'static str),
}

/// Why something of a peer is left out, as the metrics say it.
type Reason = &'static str;

/// What one side may have and the other not, as far as a message shows it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Gaps {
    /// The peer lacks something that we have.
    pub(super) theirs: bool,
    /// We may lack something that the peer has. A delta is the last operations of who sends it, so many and no more: where
    /// the first was news to us, those before it may be too.
    pub(super) ours: bool,
}

impl Gaps {
    fn add(&mut self, other: Self) {
        self.theirs |= other.theirs;
        self.ours |= other.ours;
    }

    fn of_state(sender_lacks: bool) -> Self {
        Self { theirs: sender_lacks, ours: false }
    }
}

impl Writer {
    /// Merges what a peer sent.
    pub(super) fn merge(
        &mut self,
        state: &mut RoomState,
        operations: &Checked,
        wall_ms: u64,
    ) -> rusqlite::Result<Gaps> {
        let mut gaps = Gaps::default();
        match operations {
            Checked::Plain(operations) => {
                for operation in operations {
                    gaps.add(self.merge_plain(state, operation, wall_ms)?);
                }
            }
            Checked::Attested(operations) => {
                let security = self.ruled.get(&RoomKey(state.id)).cloned();
                for attested in operations {
                    gaps.add(match &security {
                        Some(security) => self.merge_attested(security, state, attested, wall_ms)?,
                        None => self.merge_plain(state, &attested.operation, wall_ms)?,
                    });
                }
            }
        }
        Ok(gaps)
    }

    fn merge_plain(&mut self, state: &mut RoomState, operation: &Operation, wall_ms: u64) -> rusqlite::Result<Gaps> {
        match operation {
            Operation::Upsert(_) | Operation::Remove(_) | Operation::Link(_) => {
                self.take(state, operation, None, wall_ms)?;
            }
            Operation::DeltaSync(delta) => {
                let before = state.seq;
                let mut ours = false;
                for (index, operation) in delta.operations.iter().enumerate() {
                    ours |= index == 1 && state.seq > before;
                    self.take(state, operation, None, wall_ms)?;
                }
                return Ok(Gaps { theirs: false, ours });
            }
            Operation::FullStateSync(full) => {
                return Ok(Gaps::of_state(self.merge_state(state, full, Word::Anybodys, wall_ms)?.sender_lacks));
            }
            Operation::Sync(_) => {}
        }
        Ok(Gaps::default())
    }

    /// Merges an operation in a room with super admins: what its author may do.
    fn merge_attested(
        &mut self,
        security: &Security,
        state: &mut RoomState,
        attested: &Attested,
        wall_ms: u64,
    ) -> rusqlite::Result<Gaps> {
        let author = attested.author;
        match &attested.operation {
            operation @ (Operation::Upsert(_) | Operation::Remove(_) | Operation::Link(_)) => {
                match self.judge(security, state, operation, author, wall_ms)? {
                    Ok(author) => self.take_signed(state, operation, author, wall_ms)?,
                    Err(reason) => self.leave_out(state.id, reason, 1),
                }
            }
            Operation::DeltaSync(delta) => {
                let before = state.seq;
                let mut ours = false;
                for (index, (operation, inside)) in delta.operations.iter().zip(&attested.inside).enumerate() {
                    ours |= index == 1 && state.seq > before;
                    let own = self.judge(security, state, operation, *inside, wall_ms)?;
                    if let Ok(author) = own {
                        self.take_signed(state, operation, author, wall_ms)?;
                        continue;
                    }
                    // Values are filled in by who sends a delta: then only the signature of the whole holds.
                    match (self.judge(security, state, operation, author, wall_ms)?, own) {
                        (Ok(sender), _) => {
                            let mut operation = operation.clone();
                            if inside.is_err() {
                                unsign(&mut operation);
                            }
                            self.take(state, &operation, Some(sender), wall_ms)?;
                        }
                        (Err(reason), Err("unsigned")) | (Err("unsigned"), Err(reason)) | (Err(_), Err(reason)) => {
                            self.leave_out(state.id, reason, 1);
                        }
                        (Err(_), Ok(_)) => {}
                    }
                }
                return Ok(Gaps { theirs: false, ours });
            }
            Operation::FullStateSync(full) => {
                let word = match author {
                    Ok(author) => Word::Of(security, author),
                    Err(SignatureError::Unsigned) if security.unsigned_states => Word::Unsigned(security),
                    Err(error) => Word::Nobodys(reason_of(error)),
                };
                return Ok(Gaps::of_state(self.merge_state(state, full, word, wall_ms)?.sender_lacks));
            }
            Operation::Sync(_) => {}
        }
        Ok(Gaps::default())
    }

    /// Whether whoever signed may do what an operation does; if so, who.
    pub(super) fn judge(
        &self,
        security: &Security,
        state: &mut RoomState,
        operation: &Operation,
        author: Result<Address, SignatureError>,
        wall_ms: u64,
    ) -> rusqlite::Result<Result<Address, Reason>> {
        let author = match author {
            Ok(author) => author,
            Err(error) => return Ok(Err(reason_of(error))),
        };
        let Some(change) = Change::of(operation) else { return Ok(Err("not_permitted")) };
        let mut graph = RoomGraph { connection: &self.file.connection, state };
        let permits = security.policy.permits(&mut graph, author, change, wall_ms)?;
        Ok(if permits { Ok(author) } else { Err("not_permitted") })
    }

    /// Takes an operation with the signature of its author.
    fn take_signed(
        &mut self,
        state: &mut RoomState,
        operation: &Operation,
        author: Address,
        wall_ms: u64,
    ) -> rusqlite::Result<()> {
        if timestamp_of(operation).capped(wall_ms) == timestamp_of(operation) {
            return self.take(state, operation, None, wall_ms);
        }
        // With another timestamp it is no longer what was signed.
        let mut operation = operation.clone();
        unsign(&mut operation);
        self.take(state, &operation, Some(author), wall_ms)
    }

    /// Takes an operation, within the bounds. `vouched` is on whose word, where it does not say so itself.
    pub(super) fn take(
        &mut self,
        state: &mut RoomState,
        operation: &Operation,
        vouched: Option<Address>,
        wall_ms: u64,
    ) -> rusqlite::Result<()> {
        if let Some(reason) = self.too_much(operation, state)? {
            self.leave_out(state.id, reason, 1);
            return Ok(());
        }
        let result = match self.apply(state, operation, vouched, wall_ms)? {
            Outcome::Applied => "applied",
            Outcome::Superseded => "superseded",
            Outcome::Incomplete => "incomplete",
        };
        self.metrics.operations.with_label_values(&[result]).inc();
        Ok(())
    }

    /// Applies an operation to the graph, and logs it if that changed anything.
    pub(super) fn apply(
        &self,
        state: &mut RoomState,
        operation: &Operation,
        vouched: Option<Address>,
        wall_ms: u64,
    ) -> rusqlite::Result<Outcome> {
        let mut graph = RoomGraph { connection: &self.file.connection, state };
        let outcome = apply(&mut graph, operation, wall_ms)?;
        if outcome == Outcome::Applied {
            let operation = capped(operation, wall_ms);
            state.see(timestamp_of(&operation));
            self.log(state, 0, &operation.to_string(), vouched, wall_ms)?;
        }
        Ok(outcome)
    }

    /// Counts what is left out, and says so in the log; the peer is told nothing, since it would only try again.
    fn leave_out(&mut self, room: i64, reason: Reason, count: u64) {
        self.metrics.operations.with_label_values(&[reason]).inc_by(count);
        if count == 0 || !self.refusals.is_due((room, reason), Instant::now()) {
            return;
        }
        let name = self.name_of(RoomKey(room));
        match reason {
            "unsigned" => tracing::warn!(
                room = %name,
                "operations that nobody signed are left out: the room has super admins (seed.room.super_admins)"
            ),
            "forged" => tracing::warn!(room = %name, "operations with signatures that do not hold are left out"),
            "not_permitted" => {
                tracing::warn!(room = %name, "operations of those who may not do them are left out");
            }
            _ => tracing::warn!(
                room = %name, reason,
                "operations beyond the bounds (seed.max_value_bytes, seed.max_nodes, seed.max_room_bytes) are left out"
            ),
        }
    }

    /// Why an operation is beyond the bounds, if it is.
    pub(super) fn too_much(&self, operation: &Operation, state: &mut RoomState) -> rusqlite::Result<Option<Reason>> {
        let bounds = &self.config.bounds;
        let long = |id: &genosdb::JsonString| id.as_printed().len() > bounds.id_bytes;
        let too_large = match operation {
            Operation::Upsert(Upsert { id, value, extra, .. }) | Operation::Remove(Remove { id, value, extra, .. }) => {
                let value = value.as_ref().map_or(0, |value| value.as_str().len());
                long(id) || value + extra_bytes(extra) > bounds.value_bytes
            }
            Operation::Link(Link { source, target, extra, .. }) => {
                long(source)
                    || long(target)
                    || extra_bytes(extra) > bounds.value_bytes
                    || RoomGraph { connection: &self.file.connection, state }.edges_bytes(source)?
                        > bounds.edges.saturating_mul(AVERAGE_EDGE_BYTES)
            }
            _ => false,
        };
        let is_full = state.nodes >= bounds.nodes || state.bytes >= bounds.room_bytes;
        Ok(if too_large {
            Some("too_large")
        } else if is_full && matches!(operation, Operation::Upsert(_) | Operation::Link(_)) {
            Some("room_full")
        } else {
            None
        })
    }

    /// Merges a full state, on somebody's word and within the bounds.
    pub(super) fn merge_state(
        &mut self,
        state: &mut RoomState,
        full: &FullStateSync,
        word: Word<'_>,
        wall_ms: u64,
    ) -> rusqlite::Result<MergedState> {
        let bounds = self.config.bounds;
        let (mut too_large, mut not_permitted) = (0, 0);
        let (mut taken, mut taken_bytes) = (0, 0);
        let (held, held_bytes) = (state.nodes, state.bytes);
        let accept = |graph: &mut RoomGraph<'_>, news: News<'_>| {
            let change = match news {
                News::Node(node) => Change::Node(node),
                News::Removal(removal) => Change::Remove(&removal.id),
            };
            let permitted = match word {
                Word::Anybodys => true,
                Word::Of(security, author) => security.policy.permits(graph, author, change, wall_ms)?,
                Word::Unsigned(security) => security.policy.permits_unsigned(graph, change)?,
                Word::Nobodys(_) => false,
            };
            not_permitted += u64::from(!permitted);
            let News::Node(node) = news else { return Ok(permitted) };
            let value = node.value.as_ref().map_or(0, |value| value.as_str().len()) + extra_bytes(&node.extra);
            let fits = node.id.as_printed().len() <= bounds.id_bytes
                && value <= bounds.value_bytes
                && node.edges.len() <= bounds.edges
                && node.edges.iter().all(|edge| edge.as_printed().len() <= bounds.id_bytes)
                && held + taken < bounds.nodes
                && held_bytes + taken_bytes < bounds.room_bytes;
            let accepted = fits && permitted;
            taken += u64::from(accepted);
            taken_bytes += if accepted { u64::try_from(value).unwrap_or(u64::MAX) } else { 0 };
            too_large += u64::from(!fits);
            Ok(accepted)
        };
        let mut graph = RoomGraph { connection: &self.file.connection, state };
        let merged = merge(&mut graph, full, wall_ms, accept)?;
        let vouched = match word {
            Word::Of(_, author) => Some(author),
            Word::Anybodys | Word::Unsigned(_) | Word::Nobodys(_) => None,
        };
        for removal in &merged.removals {
            state.see(removal.timestamp);
            let operation = Operation::Remove(Remove {
                id: removal.id.clone(),
                value: None,
                timestamp: removal.timestamp,
                extra: Vec::new(),
            });
            self.log(state, 0, &operation.to_string(), vouched, wall_ms)?;
        }
        for node in &merged.nodes {
            state.see(node.timestamp);
            let mut text = String::new();
            node.print(&mut text);
            self.log(state, 1, &text, vouched, wall_ms)?;
        }
        let applied = u64::try_from(merged.nodes.len() + merged.removals.len()).unwrap_or(u64::MAX);
        self.metrics.operations.with_label_values(&["applied"]).inc_by(applied);
        self.leave_out(state.id, "too_large", too_large);
        let reason = if let Word::Nobodys(reason) = word { reason } else { "not_permitted" };
        self.leave_out(state.id, reason, not_permitted);
        Ok(MergedState { sender_lacks: merged.sender_lacks, applied, left_out: too_large + not_permitted })
    }

    fn log(
        &self,
        state: &mut RoomState,
        kind: i64,
        operation: &str,
        vouched: Option<Address>,
        wall_ms: u64,
    ) -> rusqlite::Result<()> {
        state.seq += 1;
        self.file
            .connection
            .prepare_cached(
                "INSERT INTO log (room, seq, received, kind, operation, vouched) VALUES (?, ?, ?, ?, ?, ?)",
            )?
            .execute(params![
                state.id,
                signed(state.seq),
                signed(wall_ms),
                kind,
                operation,
                vouched.map(|address| address.to_string())
            ])?;
        Ok(())
    }
}

/// What a full state has come to.
pub(super) struct MergedState {
    pub(super) sender_lacks: bool,
    /// Nodes and removals that were taken over.
    pub(super) applied: u64,
    /// Those that were not, although they were news.
    pub(super) left_out: u64,
}

fn reason_of(error: SignatureError) -> Reason {
    if error == SignatureError::Unsigned { "unsigned" } else { "forged" }
}

fn extra_bytes(extra: &genosdb::operation::Extra) -> usize {
    extra.iter().map(|(name, value)| name.as_printed().len() + value.as_str().len()).sum()
}

/// The operation with its timestamp as the merge rules used it.
fn capped(operation: &Operation, wall_ms: u64) -> Operation {
    let mut operation = operation.clone();
    if let Operation::Upsert(Upsert { timestamp, .. })
    | Operation::Remove(Remove { timestamp, .. })
    | Operation::Link(Link { timestamp, .. }) = &mut operation
    {
        *timestamp = timestamp.capped(wall_ms);
    }
    operation
}

/// When a change was made.
pub(crate) fn timestamp_of(operation: &Operation) -> Hlc {
    match operation {
        Operation::Upsert(Upsert { timestamp, .. })
        | Operation::Remove(Remove { timestamp, .. })
        | Operation::Link(Link { timestamp, .. }) => *timestamp,
        Operation::Sync(_) | Operation::DeltaSync(_) | Operation::FullStateSync(_) => Hlc::default(),
    }
}
