//! JSON as JavaScript reads and prints it.
//!
//! A value that passes through Homeport must come out as `JSON.stringify(JSON.parse(text))` would print it:
//! numbers in JavaScript's shortest form, lone surrogates as escapes, index-like keys first, the last of two
//! equal keys. Rust's `String` cannot hold a lone surrogate, and JSON crates print floats their own way; so a
//! [`Json`] is the printed text itself, normalised once at the edge. Signatures are made over that text.

mod reader;
mod value;

use std::fmt;

pub(crate) use reader::sorting_key;
pub use reader::{Order, sorted_place};
use reader::{Reader, WHITE_SPACE, print_char};
pub use value::Value;

/// How deep arrays and objects may nest.
pub const MAX_DEPTH: usize = 128;

/// Text is not the JSON it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum JsonError {
    /// Not JSON.
    #[error("not JSON, at byte {0}")]
    Syntax(usize),
    /// Nested deeper than [`MAX_DEPTH`].
    #[error("nested deeper than {MAX_DEPTH}")]
    TooDeep,
    /// JSON, but of another type than the one that belongs here.
    #[error("expected {0}")]
    Type(&'static str),
}

/// Any JSON value, as the text that JavaScript would print for it.
///
/// Values order by that text, which means nothing but that all agree on it.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Json(Box<str>);

impl Json {
    /// Parses a whole text.
    ///
    /// # Errors
    /// [`JsonError`] where JavaScript's `JSON.parse` would throw, and for nesting beyond [`MAX_DEPTH`].
    pub fn parse(text: &str) -> Result<Self, JsonError> {
        let mut reader = Reader::new(text);
        let value = reader.value()?;
        reader.end()?;
        Ok(value)
    }

    /// Parses a whole text; the members of every object are then in `order`.
    ///
    /// # Errors
    /// See [`Json::parse`].
    pub fn parse_in(text: &str, order: Order) -> Result<Self, JsonError> {
        let mut reader = Reader::ordering(text, order);
        let value = reader.value()?;
        reader.end()?;
        Ok(value)
    }

    /// Takes text that this module printed earlier, as it comes back from storage.
    pub fn from_printed(text: String) -> Self {
        Self(text.into_boxed_str())
    }

    /// The value as JavaScript prints it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A JavaScript string, lone surrogates included, held as JSON prints it between the quotes.
///
/// Two strings are equal exactly when their printed forms are.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct JsonString(Box<str>);

impl JsonString {
    /// The string `text`.
    pub fn new(text: &str) -> Self {
        let mut printed = String::with_capacity(text.len());
        for character in text.chars() {
            print_char(&mut printed, character);
        }
        Self(printed.into_boxed_str())
    }

    /// Takes what [`JsonString::as_printed`] gave earlier, as it comes back from storage.
    pub fn from_printed(text: String) -> Self {
        Self(text.into_boxed_str())
    }

    /// The string as JSON prints it, without the quotes. Plain text is itself.
    pub fn as_printed(&self) -> &str {
        &self.0
    }

    /// The string as Rust holds it; a lone surrogate becomes U+FFFD.
    pub fn to_text(&self) -> String {
        let quoted = format!("\"{}\"", self.0);
        let mut text = String::with_capacity(self.0.len());
        let mut reader = Reader::new(&quoted);
        // The printed form parses: this module made it, so every unit is seen.
        let _ = reader.string_units(|unit| text.push(unit.unwrap_or(char::REPLACEMENT_CHARACTER)));
        text
    }
}

impl fmt::Display for JsonString {
    /// Prints the string with its quotes.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

impl fmt::Debug for JsonString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0)
    }
}

impl From<&str> for JsonString {
    fn from(text: &str) -> Self {
        Self::new(text)
    }
}

/// The members of an object, in the order in which JavaScript would list them, each value still as its raw text.
#[derive(Debug, Default)]
pub struct Members<'a>(Vec<(JsonString, &'a str)>);

impl<'a> Members<'a> {
    /// Reads a whole text that must be an object.
    ///
    /// # Errors
    /// [`JsonError`] when it is not.
    pub fn parse(text: &'a str) -> Result<Self, JsonError> {
        let mut reader = Reader::new(text);
        let members = reader.members()?;
        reader.end()?;
        Ok(members)
    }

    /// Takes the member called `name` out, as raw JSON text.
    pub fn take(&mut self, name: &str) -> Option<&'a str> {
        let index = self.0.iter().position(|(key, _)| key.as_printed() == name)?;
        Some(self.0.remove(index).1)
    }

    /// The members that are left, each printed as JavaScript prints it.
    ///
    /// # Errors
    /// Never for members that were read from valid JSON.
    pub fn rest(self) -> Result<Vec<(JsonString, Json)>, JsonError> {
        self.0.into_iter().map(|(key, raw)| Ok((key, Json::parse(raw)?))).collect()
    }
}

impl<'a> IntoIterator for Members<'a> {
    type Item = (JsonString, &'a str);
    type IntoIter = std::vec::IntoIter<Self::Item>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// The elements of a text that must be an array, each as raw JSON text.
///
/// # Errors
/// [`JsonError`] when it is not.
pub fn elements(text: &str) -> Result<Vec<&str>, JsonError> {
    let mut reader = Reader::new(text);
    reader.open(b'[', "an array")?;
    let mut elements = Vec::new();
    while reader.more(b']', elements.is_empty())? {
        elements.push(reader.raw()?);
    }
    reader.end()?;
    Ok(elements)
}

/// Reads a text that must be a string.
///
/// # Errors
/// [`JsonError`] when it is not.
pub fn string(text: &str) -> Result<JsonString, JsonError> {
    let mut reader = Reader::new(text);
    if reader.peek() != Some(b'"') {
        return Err(JsonError::Type("a string"));
    }
    let string = reader.string()?;
    reader.end()?;
    Ok(string)
}

/// Reads a text that must be a whole number from 0 to `max`.
///
/// # Errors
/// [`JsonError`] when it is not.
pub fn integer(text: &str, max: u64) -> Result<u64, JsonError> {
    const WRONG: JsonError = JsonError::Type("a whole number in range");
    let text = text.trim_matches(WHITE_SPACE);
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        return text.parse().ok().filter(|number| *number <= max).ok_or(WRONG);
    }
    // `1.7e12` and `5.0` are whole numbers to JavaScript.
    let number: f64 = Json::parse(text)?.as_str().parse().map_err(|_| WRONG)?;
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, clippy::cast_precision_loss)]
    if number.fract() == 0.0 && number >= 0.0 && number <= max as f64 { Ok(number as u64) } else { Err(WRONG) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn printed(text: &str) -> String {
        Json::parse(text).unwrap().to_string()
    }

    #[test]
    fn numbers_print_as_javascript_prints_them() {
        for (text, expected) in [
            ("0", "0"),
            ("-0", "0"),
            ("-0.0", "0"),
            ("1.0", "1"),
            ("1.50", "1.5"),
            ("1e21", "1e+21"),
            ("1E+20", "100000000000000000000"),
            ("123456789012345678901234567890", "1.2345678901234568e+29"),
            ("12345678901234567890", "12345678901234567000"),
            ("9007199254740993", "9007199254740992"),
            ("0.1", "0.1"),
            ("0.000001", "0.000001"),
            ("0.0000001", "1e-7"),
            ("5e-324", "5e-324"),
            ("1.7976931348623157e308", "1.7976931348623157e+308"),
            ("1e999", "null"),
            ("-1e999", "null"),
            ("1e-999", "0"),
            ("-123456789012345", "-123456789012345"),
        ] {
            assert_eq!(printed(text), expected, "{text}");
        }
    }

    #[test]
    fn strings_print_as_javascript_prints_them() {
        for (text, expected) in [
            (r#""a\/b""#, r#""a/b""#),
            (r#""\u0041\u00e9""#, r#""Aé""#),
            (r#""\u001f\u0008\u000C\n\r\t""#, r#""\u001f\b\f\n\r\t""#),
            (r#""\ud83d\ude00""#, "\"😀\""),
            (r#""\ud83d""#, r#""\ud83d""#),
            (r#""\uDE00x\uD83D""#, r#""\ude00x\ud83d""#),
            (r#""\ud83d\ud83d\ude00""#, "\"\\ud83d😀\""),
            (r#""\ud83d😀""#, "\"\\ud83d😀\""),
            ("\"\u{2028}\u{7f}\"", "\"\u{2028}\u{7f}\""),
            (r#""\"\\""#, r#""\"\\""#),
        ] {
            assert_eq!(printed(text), expected, "{text}");
        }
    }

    #[test]
    fn objects_print_in_javascript_order() {
        assert_eq!(printed(r#" { "b" : 1 , "10" : 2, "2":3, "a":[ 1 , {} ] } "#), r#"{"2":3,"10":2,"b":1,"a":[1,{}]}"#);
        assert_eq!(printed(r#"{"a":1,"b":2,"a":3}"#), r#"{"a":3,"b":2}"#);
        assert_eq!(
            printed(r#"{"01":1,"-1":2,"4294967295":3,"4294967294":4}"#),
            r#"{"4294967294":4,"01":1,"-1":2,"4294967295":3}"#
        );
        assert_eq!(printed(r#"{"__proto__":{"x":1}}"#), r#"{"__proto__":{"x":1}}"#);
    }

    #[test]
    fn what_json_parse_would_throw_at_is_refused() {
        for text in [
            "",
            " ",
            "[",
            "]",
            "{",
            "[1,]",
            "[,1]",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{a:1}",
            "01",
            "1.",
            ".5",
            "+1",
            "1e",
            "--1",
            "nul",
            "tru",
            "NaN",
            "Infinity",
            "\"",
            "\"\\x\"",
            "\"\\u12\"",
            "\"\\u+123\"",
            "\"\n\"",
            "1 2",
            "[1 2]",
            "'a'",
            "\u{feff}1",
        ] {
            assert!(matches!(Json::parse(text), Err(JsonError::Syntax(_) | JsonError::Type(_))), "{text:?}");
        }
    }

    #[test]
    fn depth_is_bounded() {
        let nested = |depth: usize| format!("{}{}", "[".repeat(depth), "]".repeat(depth));
        assert!(Json::parse(&nested(MAX_DEPTH)).is_ok());
        assert_eq!(Json::parse(&nested(MAX_DEPTH + 1)), Err(JsonError::TooDeep));
        assert_eq!(elements(&nested(1_000_000)), Err(JsonError::TooDeep));
    }

    #[test]
    fn strings_survive_as_text() {
        for text in ["", "plain", "a\"b\\c\n\u{1}é😀\u{2028}"] {
            assert_eq!(JsonString::new(text).to_text(), text);
        }
        assert_eq!(string(r#""\ud800!""#).unwrap().to_text(), "\u{fffd}!");
    }

    #[test]
    fn integers_are_whole_and_in_range() {
        assert_eq!(integer("1795337371021", u64::MAX), Ok(1_795_337_371_021));
        assert_eq!(integer(" 1.795337371021e12 ", u64::MAX), Ok(1_795_337_371_021));
        for wrong in ["-1", "1.5", "\"1\"", "null", "1e999", "11", "99999999999999999999999"] {
            assert!(integer(wrong, 10).is_err(), "{wrong}");
        }
    }
}
