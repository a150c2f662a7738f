//! Settings from defaults, file, environment and flags, and errors that say which key is wrong, where, and what
//! was probably meant.

use std::path::Path;

use figment::error::Kind;
use figment::providers::{Format as _, Serialized, Toml};
use figment::value::{Dict, Map, Tag, Value};
use figment::{Figment, Metadata, Profile, Provider};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Environment variables that set a key start with this; `__` stands between the parts of a key.
pub const ENVIRONMENT_PREFIX: &str = "HOMEPORT_";

/// Settings are wrong. The message names key, source and the nearest known key.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(String);

impl SettingsError {
    /// An error about the value of `key`.
    pub fn of(key: &str, problem: impl std::fmt::Display) -> Self {
        Self(format!("setting {key}: {problem}"))
    }
}

/// Loads settings of type `T`: its defaults, then `file`, then `environment`, then `flags`; the later wins.
///
/// `environment` are all variables of the process; those that start with [`ENVIRONMENT_PREFIX`] and name a section and
/// a key, with `__` between them, are settings. Others that start alike are not ours to judge: container platforms make
/// such names up.
///
/// # Errors
/// [`SettingsError`] for a file that cannot be read, an unknown key or a value of the wrong type.
pub fn load<T: Serialize + DeserializeOwned + Default>(
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (String, String)>,
    flags: impl Provider,
) -> Result<T, SettingsError> {
    let defaults = Figment::from(Serialized::defaults(T::default()));
    let environment = Environment::new(&defaults, environment);
    let mut figment = defaults;
    if let Some(path) = file {
        // Asked for first: figment's own error for a file that is not there does not say so plainly.
        std::fs::metadata(path).map_err(|error| SettingsError(format!("cannot read {}: {error}", path.display())))?;
        figment = figment.merge(Toml::file_exact(path));
    }
    let figment = figment.merge(environment).merge(flags);
    figment.extract().map_err(|error| explain::<T>(error))
}

/// Says what is wrong in a way that helps.
fn explain<T: Serialize + Default>(error: figment::Error) -> SettingsError {
    let known = known_keys(&T::default());
    let messages: Vec<String> = error.into_iter().map(|error| explain_one(&error, &known)).collect();
    SettingsError(messages.join("\n"))
}

fn explain_one(error: &figment::Error, known: &[String]) -> String {
    let source = error.metadata.as_ref().map_or_else(String::new, |metadata| match &metadata.source {
        Some(source) => format!("{source}: "),
        None => format!("{}: ", metadata.name),
    });
    let path = error.path.join(".");
    let message = match &error.kind {
        Kind::UnknownField(field, siblings) => {
            let parent = path.strip_suffix(field.as_str()).unwrap_or(&path).trim_end_matches('.');
            let key = join(parent, field);
            // The nearest key may stand in another section: somebody put it in the wrong one.
            let nearest = siblings
                .iter()
                .map(|sibling| join(parent, sibling))
                .chain(known.iter().cloned())
                .map(|candidate| (distance(&key, &candidate), candidate))
                .min_by_key(|(distance, _)| *distance);
            match nearest {
                Some((_, nearest)) => format!("unknown key {key}; the nearest known key is {nearest}"),
                None => format!("unknown key {key}"),
            }
        }
        Kind::MissingField(field) => format!("key {} is missing", join(&path, field)),
        Kind::InvalidType(found, expected) => format!("key {path}: expected {expected}, found {}", shown(found)),
        Kind::InvalidValue(found, expected) => format!("key {path}: expected {expected}, found {}", shown(found)),
        kind if path.is_empty() => kind.to_string(),
        kind => format!("key {path}: {kind}"),
    };
    format!("{source}{message}")
}

fn join(parent: &str, key: &str) -> String {
    if parent.is_empty() { key.to_owned() } else { format!("{parent}.{key}") }
}

/// What was found, without its text: it may be a secret that was put under the wrong key.
fn shown(actual: &figment::error::Actual) -> &'static str {
    use figment::error::Actual;
    match actual {
        Actual::Bool(_) => "a boolean",
        Actual::Unsigned(_) | Actual::Signed(_) => "a number",
        Actual::Float(_) => "a number with a fraction",
        Actual::Char(_) | Actual::Str(_) => "a string",
        Actual::Seq => "an array",
        Actual::Map => "a table",
        _ => "something else",
    }
}

fn distance(one: &str, other: &str) -> usize {
    // Keys that differ in their last part alone are nearer than ones of another section with the same last part.
    let section = |key: &str| key.rsplit_once('.').map_or(String::new(), |(section, _)| section.to_owned());
    let last = |key: &str| key.rsplit('.').next().unwrap_or_default().to_owned();
    2 * strsim::damerau_levenshtein(&last(one), &last(other)) + usize::from(section(one) != section(other))
}

/// The dotted names of all keys of the defaults.
fn known_keys<T: Serialize>(defaults: &T) -> Vec<String> {
    fn walk(prefix: &str, value: &Value, keys: &mut Vec<String>) {
        match value {
            Value::Dict(_, dict) if !dict.is_empty() => {
                for (key, value) in dict {
                    walk(&join(prefix, key), value, keys);
                }
            }
            _ => keys.push(prefix.to_owned()),
        }
    }
    let mut keys = Vec::new();
    if let Ok(value) = Value::serialize(defaults) {
        walk("", &value, &mut keys);
    }
    keys
}

/// The environment as a source of settings.
///
/// A variable's text becomes what the key's default is: where that is text or nothing, it stays text, so that a
/// password of digits alone is not taken for a number.
struct Environment(Dict);

impl Environment {
    fn new(defaults: &Figment, variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let mut root = Dict::new();
        for (name, text) in variables {
            let Some(rest) = name.strip_prefix(ENVIRONMENT_PREFIX).filter(|rest| rest.contains("__")) else { continue };
            let key = rest.to_ascii_lowercase().replace("__", ".");
            let typed = match defaults.find_value(&key) {
                Ok(Value::String(..) | Value::Empty(..)) | Err(_) => Value::from(text),
                // Numbers, booleans, arrays and tables in figment's own notation, which is close to TOML's.
                Ok(_) => text.parse().unwrap_or_else(|never: std::convert::Infallible| match never {}),
            };
            insert(&mut root, &key, typed);
        }
        Self(root)
    }
}

fn insert(dict: &mut Dict, key: &str, value: Value) {
    match key.split_once('.') {
        None => {
            dict.insert(key.to_owned(), value);
        }
        Some((section, rest)) => {
            let entry = dict.entry(section.to_owned()).or_insert_with(|| Value::Dict(Tag::Default, Dict::new()));
            if let Value::Dict(_, inner) = entry {
                insert(inner, rest, value);
            }
        }
    }
}

impl Provider for Environment {
    fn metadata(&self) -> Metadata {
        Metadata::named("environment")
    }

    fn data(&self) -> Result<Map<Profile, Dict>, figment::Error> {
        Ok(Map::from([(Profile::Default, self.0.clone())]))
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Serialize, Deserialize, PartialEq, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Settings {
        relay: Relay,
        turn: Turn,
    }

    #[derive(Debug, Serialize, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields, default)]
    struct Relay {
        listen: String,
        limit: u32,
    }

    impl Default for Relay {
        fn default() -> Self {
            Self { listen: "[::]:8080".into(), limit: 5 }
        }
    }

    #[derive(Debug, Serialize, Deserialize, PartialEq, Default)]
    #[serde(deny_unknown_fields, default)]
    struct Turn {
        secret: Option<String>,
        users: std::collections::BTreeMap<String, String>,
        rooms: Vec<String>,
    }

    fn with(file: Option<&str>, variables: &[(&str, &str)]) -> Result<Settings, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("homeport.toml");
        if let Some(text) = file {
            std::fs::write(&path, text).unwrap();
        }
        let variables = variables.iter().map(|(name, text)| ((*name).to_owned(), (*text).to_owned()));
        load(file.map(|_| path.as_path()), variables, Serialized::defaults(Dict::new()))
            .map_err(|error| error.to_string())
    }

    #[test]
    fn later_sources_win() {
        assert_eq!(with(None, &[]).unwrap(), Settings::default());
        let file = "[relay]\nlisten = \"127.0.0.1:1\"\nlimit = 6\n";
        let settings = with(Some(file), &[("HOMEPORT_RELAY__LISTEN", "[::]:9999"), ("HOME", "/root")]).unwrap();
        assert_eq!(settings.relay, Relay { listen: "[::]:9999".into(), limit: 6 });
    }

    #[test]
    fn the_environment_sets_text_numbers_and_tables() {
        let settings = with(
            None,
            &[
                ("HOMEPORT_TURN__SECRET", "0123"),
                ("HOMEPORT_RELAY__LIMIT", "7"),
                ("HOMEPORT_TURN__USERS", r#"{alice="pass"}"#),
                ("HOMEPORT_TURN__ROOMS", r#"["a","b"]"#),
                ("HOMEPORT_PORT_8080_TCP", "not a setting"),
            ],
        )
        .unwrap();
        assert_eq!(settings.turn.secret.as_deref(), Some("0123"));
        assert_eq!(settings.relay.limit, 7);
        assert_eq!(settings.turn.users["alice"], "pass");
        assert_eq!(settings.turn.rooms, ["a", "b"]);
    }

    #[test]
    fn an_unknown_key_is_named_with_its_file_and_the_nearest_known_one() {
        let message = with(Some("[relay]\nlistn = \"x\"\n"), &[]).unwrap_err();
        assert!(message.contains("relay.listn") && message.contains("relay.listen"), "{message}");
        assert!(message.contains("homeport.toml"), "{message}");
        let message = with(Some("[rely]\nlisten = \"x\"\n"), &[]).unwrap_err();
        assert!(message.contains("rely") && message.contains("nearest known key is relay"), "{message}");
        let message = with(None, &[("HOMEPORT_RELAY__LISTN", "x")]).unwrap_err();
        assert!(message.contains("relay.listn") && message.contains("environment"), "{message}");
    }

    #[test]
    fn a_value_of_the_wrong_type_is_named_but_not_shown() {
        let message = with(Some("[relay]\nlimit = \"hunter2\"\n"), &[]).unwrap_err();
        assert!(message.contains("relay.limit") && message.contains("homeport.toml"), "{message}");
        assert!(!message.contains("hunter2"), "{message}");
    }

    #[test]
    fn a_file_that_is_missing_or_no_toml_is_an_error() {
        let none = load::<Settings>(Some(Path::new("/nowhere.toml")), [], Serialized::defaults(Dict::new()));
        assert!(none.unwrap_err().to_string().contains("/nowhere.toml"));
        let message = with(Some("[relay\n"), &[]).unwrap_err();
        assert!(message.contains("homeport.toml"), "{message}");
    }
}
