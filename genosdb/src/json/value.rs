//! JSON as a tree, for looking into: what a query or a rule asks of a node's value.

use super::{Json, JsonError, Reader};

/// A value of JavaScript that JSON can say.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `null`
    Null,
    /// `true` or `false`
    Bool(bool),
    /// A number.
    Number(f64),
    /// A string; a lone surrogate in it is U+FFFD.
    String(String),
    /// An array.
    Array(Vec<Value>),
    /// An object: its members, each key once, in the order in which JavaScript lists them.
    Object(Vec<(String, Value)>),
}

impl Value {
    /// Parses a whole text.
    ///
    /// # Errors
    /// See [`Json::parse`].
    pub fn parse(text: &str) -> Result<Self, JsonError> {
        let mut reader = Reader::new(text);
        let value = reader.tree()?;
        reader.end()?;
        Ok(value)
    }

    /// The member called `name`; `None` also when this is not an object.
    pub fn get(&self, name: &str) -> Option<&Self> {
        match self {
            Self::Object(members) => members.iter().find(|(key, _)| key == name).map(|(_, value)| value),
            _ => None,
        }
    }

    /// The text, when this is a string.
    pub fn as_str(&self) -> Option<&str> {
        match self {
            Self::String(text) => Some(text),
            _ => None,
        }
    }

    /// The number, when this is one.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }
}

impl From<&Json> for Value {
    fn from(json: &Json) -> Self {
        // A `Json` is text that was parsed before.
        Self::parse(json.as_str()).unwrap_or(Self::Null)
    }
}
