//! `docs/configuration.md`, made of the settings' own doc comments and defaults.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::Value;

use super::seed::{BackupSettings, CellsSettings, RoomSettings};
use super::turn::TurnServerSettings;
use super::{AcmeSettings, Settings};

const SOURCES: [&str; 6] = [
    include_str!("../settings.rs"),
    include_str!("cluster.rs"),
    include_str!("relay.rs"),
    include_str!("seed.rs"),
    include_str!("tls.rs"),
    include_str!("turn.rs"),
];
const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
/// Says that the file is to be written instead of compared.
const UPDATE: &str = "UPDATE_DOCS";

const HEAD: &str = "# Settings

<!-- Made of the doc comments in homeport/src/settings by: UPDATE_DOCS=1 cargo test -p homeport configuration_reference -->

None are needed. They come from `homeport.toml` in the current folder, or else `/etc/homeport/homeport.toml` (or `--config FILE`), then from the environment,
then from flags; the later wins. In the environment a key is in capitals behind `HOMEPORT_`, with two underscores between its parts:
`HOMEPORT_RELAY__LISTEN=[::]:8080`; a list is `[\"one\", \"other\"]`, a table `{a=1}`. A key that does not exist is an error that names the nearest one that does. All are read at the start; the
files of the certificate are read again when they change, and rooms come and go with `homeport rooms`.

`homeport init` writes a first file. `homeport check --offline` says what is odd in one.
";

/// The sections, in the order of the page: the key, the struct that describes it, and its defaults.
fn sections() -> Vec<(&'static str, &'static str, Value)> {
    let value = |value: serde_json::Result<Value>| value.unwrap();
    let all = value(serde_json::to_value(Settings::default()));
    vec![
        ("[relay]", "RelaySettings", all["relay"].clone()),
        ("[turn]", "TurnSettings", all["turn"].clone()),
        ("[[turn.servers]]", "TurnServerSettings", value(serde_json::to_value(TurnServerSettings::default()))),
        ("[seed]", "SeedSettings", all["seed"].clone()),
        ("[[seed.room]]", "RoomSettings", value(serde_json::to_value(RoomSettings::default()))),
        ("[seed.room.cells]", "CellsSettings", value(serde_json::to_value(CellsSettings::default()))),
        ("[seed.backup]", "BackupSettings", value(serde_json::to_value(BackupSettings::default()))),
        ("[tls]", "TlsSettings", all["tls"].clone()),
        ("[tls.acme]", "AcmeSettings", value(serde_json::to_value(AcmeSettings::default()))),
        ("[metrics]", "MetricsSettings", all["metrics"].clone()),
        ("[cluster]", "ClusterSettings", all["cluster"].clone()),
    ]
}

/// The fields of a struct with their doc comments, in the order of the source.
fn fields(name: &str) -> Vec<(String, String)> {
    let start = format!("struct {name} {{");
    let source = SOURCES.iter().find(|source| source.contains(&start)).unwrap_or_else(|| panic!("no struct {name}"));
    let mut fields = Vec::new();
    let mut doc = String::new();
    for line in source.split(&start).nth(1).unwrap().lines().map(str::trim) {
        if let Some(text) = line.strip_prefix("///") {
            doc = format!("{doc} {}", text.trim()).trim().to_owned();
        } else if line == "}" {
            break;
        } else if let Some((field, _)) = line.split_once(": ") {
            let field = field.rsplit(' ').next().unwrap_or(field);
            fields.push((field.to_owned(), std::mem::take(&mut doc)));
        }
    }
    fields
}

fn shown(default: &Value) -> String {
    match default {
        Value::Null => "none".to_owned(),
        Value::String(text) if text.is_empty() => "none".to_owned(),
        other => format!("`{other}`"),
    }
}

fn page() -> String {
    let mut page = HEAD.to_owned();
    for (section, name, defaults) in sections() {
        let _ = write!(page, "\n## `{section}`\n\n| key | default | what it is |\n| --- | --- | --- |\n");
        let elsewhere = ["room", "backup", "acme", "servers"];
        let defaults: BTreeMap<String, Value> = serde_json::from_value(defaults).unwrap();
        for (field, doc) in fields(name) {
            assert!(!doc.is_empty(), "{section} {field} has no doc comment");
            assert!(!doc.contains('|'), "{section} {field}: a | ends the table's cell");
            if name != "RoomSettings" && elsewhere.contains(&field.as_str()) {
                let _ = writeln!(page, "| `{field}` | | {doc} See below. |");
            } else {
                let default = shown(defaults.get(&field).unwrap_or(&Value::Null));
                let _ = writeln!(page, "| `{field}` | {default} | {doc} |");
            }
        }
    }
    page
}

#[test]
fn the_configuration_reference_is_up_to_date() {
    let page = page();
    if std::env::var_os(UPDATE).is_some() {
        std::fs::write(FILE, &page).unwrap();
    }
    let written = std::fs::read_to_string(FILE).unwrap_or_default();
    assert!(
        written == page,
        "docs/configuration.md is stale: UPDATE_DOCS=1 cargo test -p homeport configuration_reference"
    );
}
