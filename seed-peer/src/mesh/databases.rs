//! The databases whose rooms the seed is in, and how that changes while it runs.

use std::time::Instant;

use genosdb::PeerId;

use super::live::Live;
use super::room::{Governor, MeshRoom, Part, RoomAnswers, place};
use super::watermarks::Watermarks;
use super::{Mesh, RoomId};
use crate::archive::{OpenRoom, RoomKey};
use crate::cells::Cells;
use crate::room::RoomPeer;
use crate::rooms::{Command, RoomError, RoomStatus, Source};
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
    /// The rooms of graph and application; none while it is paused.
    pub(crate) rooms: Vec<RoomId>,
}

impl Mesh {
    /// Takes a database in, and joins its rooms unless it is paused.
    pub(crate) fn join(&mut self, config: RoomConfig, opened: &OpenRoom, source: Source, now: Instant) {
        let name = config.name.clone();
        let OpenRoom { key, peer: base, latest, paused } = *opened;
        if config.security.is_some() {
            self.archive.rule(key);
        }
        self.state.databases.insert(name.clone(), Database { config, key, base, source, latest, rooms: Vec::new() });
        if !paused {
            self.enter(&name, now);
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
        let key_of = |name: &str| self.state.databases.get(name).map(|database| database.key);
        match command {
            Command::Edit { name, edits, respond } => match key_of(&name) {
                Some(key) => self.archive.edit(key, edits, wall_ms(), respond),
                // Who asked may have given up waiting, here and below.
                None => drop(respond.send(Err(RoomError::Unknown))),
            },
            Command::Import { name, nodes, removals, respond } => match key_of(&name) {
                Some(key) => self.archive.import(key, nodes, removals, wall_ms(), respond),
                None => drop(respond.send(Err(RoomError::Unknown))),
            },
            Command::Tell { name, respond } => {
                let key = key_of(&name);
                if let Some(key) = key {
                    self.tell_everything(key);
                }
                let _ = respond.send(key.map(|_| ()).ok_or(RoomError::Unknown));
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
                let Some(database) = self.state.databases.get(&name) else {
                    let _ = respond.send(Err(RoomError::Unknown));
                    return;
                };
                let key = database.key;
                if paused {
                    self.exit(&name, now);
                } else {
                    self.enter(&name, now);
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
            paused: database.rooms.is_empty(),
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
