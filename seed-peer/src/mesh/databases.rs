//! The databases whose rooms the seed is in, and how that changes while it runs.

use std::time::Instant;

use genosdb::PeerId;

use super::live::Live;
use super::room::{Governor, MeshRoom, Part, RoomAnswers, place};
use super::watermarks::Watermarks;
use super::{Mesh, RoomId};
use crate::archive::{OpenRoom, RoomKey};
use crate::cells::Cells;
use crate::cluster::KeeperCommand;
use crate::room::RoomPeer;
use crate::rooms::{Command, Respond, RoomError, RoomStatus, Source};
use crate::roster::Roster;
use crate::server::RoomConfig;
use crate::time_of_day::wall_ms;

/// A database that the seed keeps.
pub(crate) struct Database {
    pub(crate) config: RoomConfig,
    pub(crate) key: RoomKey,
    /// The id that the seed's ids in its rooms are made from.
    pub(crate) base: PeerId,
    pub(crate) source: Source,
    pub(crate) latest: Option<genosdb::Hlc>,
    /// The rooms of graph and application; none while it is paused, or another machine's.
    pub(crate) rooms: Vec<RoomId>,
    pub(crate) paused: bool,
    /// Of a room of a cluster: whether this machine holds it.
    pub(crate) held: bool,
}

impl Mesh {
    /// Takes a database in, and joins its rooms unless it is paused.
    pub(crate) fn join(&mut self, config: RoomConfig, opened: &OpenRoom, source: Source, now: Instant) {
        let name = config.name.clone();
        let OpenRoom { key, peer: base, latest, operations, paused } = *opened;
        if config.security.is_some() {
            self.archive.rule(key);
        }
        let database = Database { config, key, base, source, latest, rooms: Vec::new(), paused, held: false };
        self.state.databases.insert(name.clone(), database);
        match &self.shared {
            None if !paused => self.enter(&name, now),
            Some(shared) if !paused => shared.tell(KeeperCommand::Offer { name, key, operations }),
            _ => {}
        }
    }

    /// A room of the cluster is ours, and its archive ready.
    pub(super) fn held(&mut self, key: RoomKey, latest: Option<genosdb::Hlc>, respond: Respond, now: Instant) {
        let held = self.state.databases.iter_mut().find(|(_, database)| database.key == key && database.held);
        // It may have been taken from us meanwhile. Who asked may have given up waiting, here and below.
        let Some((name, database)) = held else { return drop(respond.send(Err(RoomError::Elsewhere))) };
        database.latest = database.latest.max(latest);
        let name = name.clone();
        self.enter(&name, now);
        let _ = respond.send(Ok(()));
    }

    /// Leaves every room of the cluster when what we hold is not ours any more.
    pub(super) fn end_tenure(&mut self, now: Instant) {
        if self.shared.as_ref().is_none_or(|shared| shared.tenure.holds(now)) {
            return;
        }
        let held: Vec<String> = self
            .state
            .databases
            .iter()
            .filter(|(_, database)| database.held && !database.rooms.is_empty())
            .map(|(name, _)| name.clone())
            .collect();
        for name in held {
            tracing::warn!(room = %name, "the cluster was out of reach for too long: the room is left to others");
            self.exit(&name, now);
        }
    }

    /// Joins the rooms of a database.
    fn enter(&mut self, name: &str, now: Instant) {
        let Some(database) = self.state.databases.get_mut(name).filter(|database| database.rooms.is_empty()) else {
            return;
        };
        let mut topics = Vec::new();
        for part in [Part::Graph, Part::App] {
            let id = RoomId(self.state.next_room);
            self.state.next_room += 1;
            let cells = database.config.cells.map(|config| Cells::new(config, database.base));
            let ours = cells.as_ref().map_or(vec![database.base], |cells| cells.ours().to_vec());
            let security = database.config.security.as_ref();
            let has_rules = security.is_some_and(|security| !security.rules.is_empty());
            let (room, root, key) = place(part, name, &database.config.password);
            let member = |us: &PeerId| RoomPeer::new(*us, self.max_links, now);
            let room = MeshRoom {
                id,
                part,
                room,
                root,
                key,
                name: name.to_owned(),
                archive: database.key,
                latest: database.latest,
                roster: Roster::new(now),
                members: ours.iter().map(member).collect(),
                cells,
                is_ruled: security.is_some(),
                governor: (part == Part::Graph && has_rules).then(|| Governor::new(now)),
                warned: false,
                room_answers: RoomAnswers::default(),
                live: Live::default(),
                logged: 0,
                watermarks: Watermarks::new(database.latest),
                deadline: now,
            };
            topics.extend(room.topics());
            self.state.rooms.insert(id, room);
            self.state.deadlines.insert((now, id));
            database.rooms.push(id);
        }
        self.metrics.links.with_label_values(&[name]).set(0);
        self.metrics.present.with_label_values(&[name]).set(0);
        self.signalling.listen(topics);
        tracing::info!(room = %name, "in a room");
    }

    /// Leaves the rooms of a database.
    fn exit(&mut self, name: &str, now: Instant) {
        let Some(database) = self.state.databases.get_mut(name) else { return };
        for id in std::mem::take(&mut database.rooms) {
            let Some(room) = self.state.rooms.get(&id) else { continue };
            let (root, deadline) = (room.root.clone(), room.deadline);
            database_latest(&mut self.state.databases, name, room.latest);
            for us in self.state.rooms.get(&id).map(MeshRoom::ours).unwrap_or_default() {
                self.leave(id, us, now);
            }
            self.signalling.unlisten([&root]);
            self.state.rooms.remove(&id);
            self.state.deadlines.remove(&(deadline, id));
        }
        self.handle_events(now);
        for gauge in [&self.metrics.links, &self.metrics.present] {
            gauge.with_label_values(&[name]).set(0);
        }
        for gauge in [&self.metrics.cells, &self.metrics.bridged_cells] {
            // A room without cells has no such series.
            let _ = gauge.remove_label_values(&[name]);
        }
        tracing::info!(room = %name, "out of a room");
    }

    pub(super) fn handle_command(&mut self, command: Command) {
        let now = Instant::now();
        let shared = self.shared.is_some();
        let key_of = |name: &str| match self.state.databases.get(name) {
            None => Err(RoomError::Unknown),
            Some(database) if shared && database.rooms.is_empty() => Err(RoomError::Elsewhere),
            Some(database) => Ok(database.key),
        };
        match command {
            Command::Edit { name, edits, respond } => match key_of(&name) {
                Ok(key) => self.archive.edit(key, edits, wall_ms(), respond),
                // Who asked may have given up waiting, here and below.
                Err(error) => drop(respond.send(Err(error))),
            },
            Command::Import { name, nodes, removals, respond } => match key_of(&name) {
                Ok(key) => self.archive.import(key, nodes, removals, wall_ms(), respond),
                Err(error) => drop(respond.send(Err(error))),
            },
            Command::Tell { name, respond } => {
                let key = key_of(&name);
                if let Ok(key) = key {
                    self.tell_everything(key);
                }
                let _ = respond.send(key.map(drop));
            }
            Command::Hold { name, respond } => match self.state.databases.get_mut(&name) {
                None => drop(respond.send(Err(RoomError::Unknown))),
                Some(database) if database.paused => drop(respond.send(Err(RoomError::Elsewhere))),
                Some(database) => {
                    database.held = true;
                    let key = database.key;
                    self.archive.hold_room(key, respond);
                }
            },
            Command::Release { name, respond } => {
                self.exit(&name, now);
                match self.state.databases.get_mut(&name) {
                    None => drop(respond.send(Err(RoomError::Unknown))),
                    Some(database) => {
                        database.held = false;
                        let key = database.key;
                        self.archive.release_room(key, respond);
                    }
                }
            }
            Command::List { respond } => {
                let list = self.state.databases.iter().map(|(name, database)| self.status(name, database)).collect();
                let _ = respond.send(list);
            }
            Command::Add { config, respond } => {
                if self.state.databases.contains_key(&config.name) {
                    let _ = respond.send(Err(RoomError::Exists));
                } else {
                    self.archive.open_room(config, Source::Added, respond);
                }
            }
            Command::Pause { name, paused, respond } => {
                let Some(database) = self.state.databases.get_mut(&name) else {
                    let _ = respond.send(Err(RoomError::Unknown));
                    return;
                };
                let key = database.key;
                database.paused = paused;
                let operations = u64::try_from(self.metrics.logged.with_label_values(&[&name]).get()).unwrap_or(0);
                match &self.shared {
                    None if paused => self.exit(&name, now),
                    None => self.enter(&name, now),
                    Some(shared) if paused => {
                        shared.tell(KeeperCommand::Withdraw { name: name.clone() });
                        self.exit(&name, now);
                    }
                    Some(shared) => shared.tell(KeeperCommand::Offer { name, key, operations }),
                }
                self.archive.pause_room(key, paused, respond);
            }
            Command::Remove { name, respond } => match self.state.databases.get(&name) {
                None => {
                    let _ = respond.send(Err(RoomError::Unknown));
                }
                Some(database) if database.source == Source::Settings => {
                    let _ = respond.send(Err(RoomError::FromSettings));
                }
                Some(database) => {
                    let key = database.key;
                    if let Some(shared) = &self.shared {
                        shared.tell(KeeperCommand::Withdraw { name: name.clone() });
                    }
                    self.exit(&name, now);
                    self.state.databases.remove(&name);
                    for gauge in [&self.metrics.links, &self.metrics.present] {
                        let _ = gauge.remove_label_values(&[&name]);
                    }
                    self.archive.forget_room(key, respond);
                }
            },
        }
    }

    fn status(&self, name: &str, database: &Database) -> RoomStatus {
        let rooms = || database.rooms.iter().filter_map(|id| self.state.rooms.get(id));
        let graph = rooms().find(|room| room.part == Part::Graph);
        let gauge =
            |gauge: &prometheus::IntGaugeVec| u64::try_from(gauge.with_label_values(&[name]).get()).unwrap_or(0);
        RoomStatus {
            name: name.to_owned(),
            source: database.source,
            paused: database.paused,
            held_by: None,
            elsewhere: self.shared.is_some() && !database.paused && database.rooms.is_empty(),
            peers: graph.map_or(0, |room| room.roster.len()),
            links: rooms().map(MeshRoom::open_links).sum(),
            cells: graph.and_then(|room| room.cells.as_ref()).map(Cells::total_cells),
            bridged_cells: graph.and_then(|room| room.cells.as_ref()).map(Cells::bridged),
            members_by_cell: graph.and_then(|room| room.cells.as_ref()).map(Cells::statuses).unwrap_or_default(),
            nodes: gauge(&self.metrics.nodes),
            logged_operations: gauge(&self.metrics.logged),
        }
    }
}

fn database_latest(
    databases: &mut std::collections::BTreeMap<String, Database>,
    name: &str,
    latest: Option<genosdb::Hlc>,
) {
    if let Some(database) = databases.get_mut(name) {
        database.latest = database.latest.max(latest);
    }
}
