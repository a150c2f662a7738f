//! What waits to be said to other relays, on disk: records of a length (four bytes, little endian) and an event.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

/// Bytes that wait, at most.
const MAX_BYTES: u64 = 256 << 20;
/// Bytes that are handed out together, but for the last event.
const PORTION: usize = 1 << 20;
const HEAD: usize = 4;

#[derive(Debug)]
pub(super) struct Journal {
    file: File,
    /// What was said already, in bytes from the beginning; after a restart it is said again.
    said: u64,
    len: u64,
}

impl Journal {
    pub(super) fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join("cluster-unsent");
        let file = File::options().create(true).truncate(false).read(true).write(true).open(path)?;
        let mut journal = Self { len: file.metadata()?.len(), said: 0, file };
        // What was being written when the process was killed is not whole.
        let mut whole = 0;
        while let Some(len) = journal.record_at(whole)? {
            let end = whole + u64::try_from(HEAD + len).unwrap_or(u64::MAX);
            if end > journal.len {
                break;
            }
            whole = end;
        }
        journal.len = whole;
        journal.file.set_len(whole)?;
        Ok(journal)
    }

    /// The length of the record at `offset`, if there is one.
    fn record_at(&self, offset: u64) -> io::Result<Option<usize>> {
        let mut head = [0; HEAD];
        if offset + 4 > self.len {
            return Ok(None);
        }
        self.file.read_exact_at(&mut head, offset)?;
        Ok(usize::try_from(u32::from_le_bytes(head)).ok())
    }

    /// Bytes that wait.
    pub(super) fn waiting(&self) -> u64 {
        self.len - self.said
    }

    /// Adds an event.
    ///
    /// # Errors
    /// When the disk refuses, or too much waits already; nothing is added then.
    pub(super) fn append(&mut self, event: &[u8]) -> io::Result<()> {
        let head = u32::try_from(event.len()).map_err(io::Error::other)?.to_le_bytes();
        let end = self.len + u64::try_from(HEAD + event.len()).unwrap_or(u64::MAX);
        if end > MAX_BYTES {
            return Err(io::Error::other("too much waits for the other relays"));
        }
        self.file.write_all_at(&[&head, event].concat(), self.len)?;
        self.len = end;
        Ok(())
    }

    /// Some of what waits, in order, and what to [`Journal::done`] once it is said.
    pub(super) fn some(&self) -> io::Result<(Vec<Vec<u8>>, u64)> {
        let (mut events, mut offset, mut bytes) = (Vec::new(), self.said, 0);
        while bytes < PORTION
            && let Some(len) = self.record_at(offset)?
        {
            let mut event = vec![0; len];
            self.file.read_exact_at(&mut event, offset + 4)?;
            events.push(event);
            bytes += len;
            offset += u64::try_from(HEAD + len).unwrap_or(u64::MAX);
        }
        Ok((events, offset))
    }

    /// What was handed out is said.
    pub(super) fn done(&mut self, end: u64) -> io::Result<()> {
        self.said = end;
        if self.said == self.len {
            self.file.set_len(0)?;
            (self.said, self.len) = (0, 0);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_waits_is_there_after_a_kill_and_gone_once_it_is_said() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(folder.path()).unwrap();
        journal.append(b"one").unwrap();
        journal.append(b"two\nlines").unwrap();
        drop(journal);
        // The next was being written.
        let path = folder.path().join("cluster-unsent");
        let mut bytes = std::fs::read(&path).unwrap();
        bytes.extend([200, 0, 0, 0, b'x']);
        std::fs::write(&path, bytes).unwrap();
        let mut journal = Journal::open(folder.path()).unwrap();
        journal.append(b"three").unwrap();
        let (events, end) = journal.some().unwrap();
        assert_eq!(events, [b"one".to_vec(), b"two\nlines".to_vec(), b"three".to_vec()]);
        journal.append(b"four").unwrap();
        journal.done(end).unwrap();
        let (events, end) = journal.some().unwrap();
        assert_eq!(events, [b"four".to_vec()]);
        journal.done(end).unwrap();
        assert_eq!((journal.waiting(), std::fs::metadata(&path).unwrap().len()), (0, 0));
    }

    #[test]
    fn a_long_journal_is_handed_out_in_portions() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(folder.path()).unwrap();
        let event = vec![7; PORTION / 4];
        (0..10).for_each(|_| journal.append(&event).unwrap());
        let mut seen = 0;
        loop {
            let (events, end) = journal.some().unwrap();
            if events.is_empty() {
                break;
            }
            assert!(events.len() <= 5);
            seen += events.len();
            journal.done(end).unwrap();
        }
        assert_eq!(seen, 10);
    }
}
