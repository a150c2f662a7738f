//! What is remembered of clients, as a file: one author a line, so that a relay that is started anew knows them.

use std::fs::{self, File, OpenOptions};
use std::io::{BufRead as _, BufReader, BufWriter, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Asked, MAX_VALUES, is_signalling};
use crate::event::parse_lower_hex;
use crate::filter::Filter;

/// Bytes of a file that are read, at most: what all that is remembered takes, with room to spare.
const MAX_BYTES: u64 = 256 << 20;

#[derive(Debug, Serialize, Deserialize)]
struct Line {
    author: String,
    /// Names of subscriptions, and their filters as in a REQ.
    asked: Vec<(Box<str>, Vec<Value>)>,
}

/// Puts a new file in the place of the one at `path`, which only its owner may read; returns its length. One that is cut off is
/// not put there.
pub(super) fn write(path: &Path, authors: &[([u8; 32], Asked)]) -> std::io::Result<u64> {
    let partial = path.with_extension("partial");
    let mut file =
        BufWriter::new(OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&partial)?);
    for (author, asked) in authors {
        let of = |(id, filters): &(Box<str>, _)| {
            (id.clone(), AsRef::<[Filter]>::as_ref(filters).iter().map(print).collect())
        };
        let line = Line { author: hex::encode(author), asked: asked.iter().map(of).collect() };
        serde_json::to_writer(&mut file, &line)?;
        file.write_all(b"\n")?;
    }
    file.flush()?;
    let length = file.get_ref().metadata()?.len();
    fs::rename(partial, path)?;
    Ok(length)
}

/// Reads a file. Lines that are none are passed over: they come from somewhere else.
pub(super) fn read(path: &Path, clock_skew: u64) -> std::io::Result<Vec<([u8; 32], Asked)>> {
    let lines = BufReader::new(File::open(path)?.take(MAX_BYTES)).lines();
    let mut authors = Vec::new();
    for line in lines {
        authors.extend(parse(&line?, clock_skew));
    }
    Ok(authors)
}

fn parse(line: &str, clock_skew: u64) -> Option<([u8; 32], Asked)> {
    let Line { author, asked } = serde_json::from_str(line).ok()?;
    let filters = |filters: Vec<Value>| {
        let parsed = filters.iter().map(|filter| Filter::parse(&filter.to_string(), MAX_VALUES, clock_skew).ok());
        parsed.collect::<Option<Vec<Filter>>>().filter(|filters| is_signalling(filters))
    };
    let asked = asked.into_iter().map(|(id, raw)| Some((id, filters(raw)?.into()))).collect::<Option<_>>()?;
    Some((parse_lower_hex(&author)?, asked))
}

/// A filter of signalling, as in a REQ.
fn print(filter: &Filter) -> Value {
    let mut members = Map::new();
    if let Some(kinds) = &filter.kinds {
        members.insert("kinds".into(), json!(kinds.iter().collect::<Vec<_>>()));
    }
    for (letter, values) in &filter.tags {
        members.insert(format!("#{}", char::from(*letter)), json!(values.iter().collect::<Vec<_>>()));
    }
    if let Some(since) = filter.since {
        members.insert("since".into(), json!(since));
    }
    Value::Object(members)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn what_is_written_is_read_again_and_by_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("returning.jsonl");
        let filter = |json: &str| Filter::parse(json, 10, 60).unwrap();
        let asked: Asked = vec![
            ("root \"ä\"".into(), vec![filter(r##"{"kinds":[20001],"#x":["a","b"],"since":7}"##)].into()),
            ("self".into(), vec![filter(r#"{"kinds":[20002]}"#), filter(r#"{"kinds":[]}"#)].into()),
        ];
        let authors = vec![([1; 32], asked.clone()), ([2; 32], asked)];
        write(&path, &authors).unwrap();
        assert_eq!(read(&path, 60).unwrap(), authors);
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        // Of what somebody else has written there, nothing is taken that no client could have asked for.
        let [author, other] = [1, 2].map(|byte| hex::encode([byte; 32]));
        let lines = [
            "no line".to_owned(),
            r#"{"author":"short","asked":[["s",[{"kinds":[20001]}]]]}"#.to_owned(),
            format!(r#"{{"author":"{author}","asked":[["s",[{{"kinds":[1]}}]]]}}"#),
            format!(r#"{{"author":"{other}","asked":[["s",[{{"kinds":[20001]}}]]]}}"#),
        ];
        fs::write(&path, lines.join("\n")).unwrap();
        assert_eq!(read(&path, 60).unwrap().iter().map(|(author, _)| *author).collect::<Vec<_>>(), [[2; 32]]);
    }
}
