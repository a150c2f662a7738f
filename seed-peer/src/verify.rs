//! Checks the signatures in a room's log, beside the seed that writes it.

use std::path::{Path, PathBuf};

use genosdb::signature::{self, Address, SignatureError};
use rusqlite::{Connection, OpenFlags, OptionalExtension as _};

use crate::archive::FILE_NAME;

/// What the log of a room is worth as evidence.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Verification {
    /// Operations that carry a signature of whom they name.
    pub signed: u64,
    /// Operations and nodes without a signature of their own, taken on the word of one who signed what they came in.
    pub vouched: u64,
    /// Operations that carry no signature, and for which nobody vouches.
    pub unsigned: u64,
    /// Nodes that came as part of a peer's whole state, for which nobody vouches.
    pub nodes: u64,
    /// Who signed, and how many operations, ordered by address.
    pub authors: std::collections::BTreeMap<Address, u64>,
}

/// An operation that is not what it says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Doubtful {
    /// Its place in the room's log.
    pub seq: i64,
    /// When it was accepted, in ms since the Unix epoch.
    pub received_ms: i64,
    /// Why it does not hold.
    pub reason: SignatureError,
}

/// A room cannot be checked.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// There is no archive, or it cannot be read.
    #[error("cannot read {path}: {source}")]
    Archive {
        /// The archive.
        path: PathBuf,
        /// What SQLite said.
        source: rusqlite::Error,
    },
    /// The archive holds no such room.
    #[error("the archive holds no room of that name")]
    Unknown,
}

/// Checks every logged operation of the room `name` in the archive of the folder `data`; hands out those that do not
/// hold. A seed may be running on it.
///
/// # Errors
/// [`VerifyError`].
pub fn verify_room(data: &Path, name: &str, doubtful: impl FnMut(Doubtful)) -> Result<Verification, VerifyError> {
    let path = data.join(FILE_NAME);
    let connection = Connection::open_with_flags(&path, OpenFlags::SQLITE_OPEN_READ_ONLY);
    connection
        .and_then(|connection| verify(&connection, name, doubtful))
        .map_err(|source| VerifyError::Archive { path, source })?
        .ok_or(VerifyError::Unknown)
}

fn verify(
    connection: &Connection,
    name: &str,
    mut doubtful: impl FnMut(Doubtful),
) -> rusqlite::Result<Option<Verification>> {
    let room: Option<i64> =
        connection.query_row("SELECT id FROM room WHERE name = ?", [name], |row| row.get(0)).optional()?;
    let Some(room) = room else { return Ok(None) };
    let mut verification = Verification::default();
    let mut select =
        connection.prepare("SELECT seq, received, kind, operation, vouched FROM log WHERE room = ? ORDER BY seq")?;
    let mut rows = select.query([room])?;
    while let Some(row) = rows.next()? {
        let is_vouched = !matches!(row.get_ref(4)?, rusqlite::types::ValueRef::Null);
        if row.get::<_, i64>(2)? != 0 {
            let count = if is_vouched { &mut verification.vouched } else { &mut verification.nodes };
            *count += 1;
            continue;
        }
        match signature::verify(row.get_ref(3)?.as_str()?) {
            Ok(author) => {
                verification.signed += 1;
                *verification.authors.entry(author).or_default() += 1;
            }
            Err(SignatureError::Unsigned) if is_vouched => verification.vouched += 1,
            Err(SignatureError::Unsigned) => verification.unsigned += 1,
            Err(reason) => doubtful(Doubtful { seq: row.get(0)?, received_ms: row.get(1)?, reason }),
        }
    }
    Ok(Some(verification))
}

#[cfg(test)]
mod tests {
    use genosdb::signature::Identity;
    use rusqlite::params;

    use super::*;
    use crate::archive::schema;

    #[test]
    fn what_holds_is_counted_and_what_does_not_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let identity = Identity::parse(&"42".repeat(32)).unwrap();
        let upsert =
            |id: &str| format!(r#"{{"type":"upsert","id":"{id}","value":1,"timestamp":{{"physical":5,"logical":1}}}}"#);
        let signed = identity.sign(&upsert("a")).unwrap();
        let file = schema::open(folder.path()).unwrap();
        file.connection
            .execute("INSERT INTO room (name, peer_id, nodes, seq) VALUES ('my-app', 'z', 0, 0)", [])
            .unwrap();
        let log = [
            (0, signed.clone()),
            (0, upsert("b")),
            (0, signed.replace(r#""id":"a""#, r#""id":"c""#)),
            (1, r#"{"id":"d","edges":[],"timestamp":{"physical":5,"logical":1}}"#.to_owned()),
            (0, identity.sign(&upsert("e")).unwrap()),
        ];
        for (index, (kind, operation)) in log.iter().enumerate() {
            let seq = i64::try_from(index).unwrap() + 1;
            file.connection
                .execute(
                    "INSERT INTO log (room, seq, received, kind, operation) VALUES (1, ?, ?, ?, ?)",
                    params![seq, 1_000 + seq, kind, operation],
                )
                .unwrap();
        }
        let mut found = Vec::new();
        // While the archive is open elsewhere, as by a seed.
        let verification = verify_room(folder.path(), "my-app", |doubtful| found.push(doubtful)).unwrap();
        assert_eq!((verification.signed, verification.unsigned, verification.nodes), (2, 1, 1));
        assert_eq!(verification.authors, [(identity.address(), 2)].into());
        assert_eq!(found, [Doubtful { seq: 3, received_ms: 1_003, reason: SignatureError::Forged }]);
        assert!(matches!(verify_room(folder.path(), "other", |_| ()), Err(VerifyError::Unknown)));
        assert!(matches!(verify_room(Path::new("/nowhere"), "my-app", |_| ()), Err(VerifyError::Archive { .. })));
    }
}
