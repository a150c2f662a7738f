//! Checks the signatures in a room's log, beside the seed that writes it.

use genosdb::signature::{self, Address, SignatureError};

use super::{Entry, EntryKind, History, HistoryError};

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
    pub seq: u64,
    /// When it was accepted, in ms since the Unix epoch.
    pub received_ms: u64,
    /// Why it does not hold.
    pub reason: SignatureError,
}

impl History {
    /// Checks every logged operation; hands out those that do not hold.
    ///
    /// # Errors
    /// [`HistoryError`].
    pub fn verify(&self, mut doubtful: impl FnMut(Doubtful)) -> Result<Verification, HistoryError> {
        let mut verification = Verification::default();
        self.entries(1, u64::MAX, |entry| {
            let Entry { seq, received_ms, kind, text, vouched } = entry;
            if kind == EntryKind::Node {
                let count = if vouched.is_some() { &mut verification.vouched } else { &mut verification.nodes };
                *count += 1;
                return true;
            }
            match signature::verify(&text) {
                Ok(author) => {
                    verification.signed += 1;
                    *verification.authors.entry(author).or_default() += 1;
                }
                Err(SignatureError::Unsigned) if vouched.is_some() => verification.vouched += 1,
                Err(SignatureError::Unsigned) => verification.unsigned += 1,
                Err(reason) => doubtful(Doubtful { seq, received_ms, reason }),
            }
            true
        })?;
        Ok(verification)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

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
        let history = History::open(folder.path(), "my-app").unwrap();
        let verification = history.verify(|doubtful| found.push(doubtful)).unwrap();
        assert_eq!((verification.signed, verification.unsigned, verification.nodes), (2, 1, 1));
        assert_eq!(verification.authors, [(identity.address(), 2)].into());
        assert_eq!(found, [Doubtful { seq: 3, received_ms: 1_003, reason: SignatureError::Forged }]);
        assert!(matches!(History::open(folder.path(), "other"), Err(HistoryError::Unknown)));
        assert!(matches!(History::open(Path::new("/nowhere"), "my-app"), Err(HistoryError::Archive { .. })));
    }
}
