//! Reads JSON text, and prints it as JavaScript does, in one pass.

use std::collections::HashMap;

use super::{Json, JsonError, JsonString, MAX_DEPTH, Members, Value};

/// What JSON calls white space (RFC 8259, section 2).
pub(super) const WHITE_SPACE: [char; 4] = [' ', '\t', '\n', '\r'];

/// A cursor over JSON text.
pub(super) struct Reader<'a> {
    text: &'a str,
    position: usize,
    depth: usize,
    order: Order,
}

/// The order in which the members of an object are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Order {
    /// As JavaScript lists them: index-like keys first, then in the order in which they were set.
    Object,
    /// As in an object whose members were set in the order of their keys: index-like keys first, ascending.
    Sorted,
    /// By their keys as text, index-like ones too.
    SortedAsText,
}

impl<'a> Reader<'a> {
    pub(super) fn new(text: &'a str) -> Self {
        Self { text, position: 0, depth: 0, order: Order::Object }
    }

    /// A reader that prints members in an order of their own.
    pub(super) fn ordering(text: &'a str, order: Order) -> Self {
        Self { order, ..Self::new(text) }
    }

    fn syntax<T>(&self) -> Result<T, JsonError> {
        Err(JsonError::Syntax(self.position))
    }

    fn byte(&self) -> Option<u8> {
        self.text.as_bytes().get(self.position).copied()
    }

    /// The next byte that is not white space, which is left in place.
    pub(super) fn peek(&mut self) -> Option<u8> {
        while let Some(b' ' | b'\t' | b'\n' | b'\r') = self.byte() {
            self.position += 1;
        }
        self.byte()
    }

    pub(super) fn end(&mut self) -> Result<(), JsonError> {
        if self.peek().is_some() { self.syntax() } else { Ok(()) }
    }

    /// Steps into an array or object.
    pub(super) fn open(&mut self, bracket: u8, expected: &'static str) -> Result<(), JsonError> {
        match self.peek() {
            Some(byte) if byte == bracket => {
                self.depth += 1;
                if self.depth > MAX_DEPTH {
                    return Err(JsonError::TooDeep);
                }
                self.position += 1;
                Ok(())
            }
            None => self.syntax(),
            Some(_) => Err(JsonError::Type(expected)),
        }
    }

    /// Whether another element follows; steps over the comma before it, or out of the closing bracket.
    pub(super) fn more(&mut self, bracket: u8, first: bool) -> Result<bool, JsonError> {
        match self.peek() {
            Some(byte) if byte == bracket => {
                self.position += 1;
                self.depth -= 1;
                Ok(false)
            }
            Some(_) if first => Ok(true),
            Some(b',') => {
                self.position += 1;
                // A comma must be followed by an element: `[1,]` is not JSON.
                if self.peek() == Some(bracket) { self.syntax() } else { Ok(true) }
            }
            _ => self.syntax(),
        }
    }

    fn key(&mut self) -> Result<JsonString, JsonError> {
        if self.peek() != Some(b'"') {
            return self.syntax();
        }
        let key = self.string()?;
        if self.peek() != Some(b':') {
            return self.syntax();
        }
        self.position += 1;
        Ok(key)
    }

    pub(super) fn value(&mut self) -> Result<Json, JsonError> {
        let mut printed = String::new();
        self.print_value(&mut printed)?;
        Ok(Json(printed.into_boxed_str()))
    }

    /// Reads a value as a tree.
    pub(super) fn tree(&mut self) -> Result<Value, JsonError> {
        Ok(match self.peek() {
            Some(b'{') => {
                self.open(b'{', "an object")?;
                let mut members = Vec::new();
                while self.more(b'}', members.is_empty())? {
                    let key = self.key()?;
                    members.push((key, self.tree()?));
                }
                let members = in_javascript_order(members, |(key, _)| key.as_printed());
                Value::Object(members.into_iter().map(|(key, value)| (key.to_text(), value)).collect())
            }
            Some(b'[') => {
                self.open(b'[', "an array")?;
                let mut elements = Vec::new();
                while self.more(b']', elements.is_empty())? {
                    elements.push(self.tree()?);
                }
                Value::Array(elements)
            }
            Some(b'"') => Value::String(self.string()?.to_text()),
            _ => match self.scalar()? {
                "null" => Value::Null,
                "true" => Value::Bool(true),
                "false" => Value::Bool(false),
                // A number too great for JavaScript is Infinity there, as it is here.
                number => Value::Number(number.parse().unwrap_or(f64::NAN)),
            },
        })
    }

    /// Skips one value and returns its text, checked.
    pub(super) fn raw(&mut self) -> Result<&'a str, JsonError> {
        self.peek();
        let start = self.position;
        self.skip_value()?;
        Ok(&self.text[start..self.position])
    }

    pub(super) fn members(&mut self) -> Result<Members<'a>, JsonError> {
        self.open(b'{', "an object")?;
        let mut members: Vec<(JsonString, &'a str)> = Vec::new();
        let mut first = true;
        while self.more(b'}', first)? {
            first = false;
            let key = self.key()?;
            members.push((key, self.raw()?));
        }
        Ok(Members(in_javascript_order(members, |(key, _)| key.as_printed())))
    }

    fn skip_value(&mut self) -> Result<(), JsonError> {
        match self.peek() {
            Some(b'{') => {
                self.open(b'{', "an object")?;
                let mut first = true;
                while self.more(b'}', first)? {
                    first = false;
                    if self.peek() != Some(b'"') {
                        return self.syntax();
                    }
                    self.string_units(|_| ())?;
                    if self.peek() != Some(b':') {
                        return self.syntax();
                    }
                    self.position += 1;
                    self.skip_value()?;
                }
                Ok(())
            }
            Some(b'[') => {
                self.open(b'[', "an array")?;
                let mut first = true;
                while self.more(b']', first)? {
                    first = false;
                    self.skip_value()?;
                }
                Ok(())
            }
            Some(b'"') => self.string_units(|_| ()),
            _ => self.scalar().map(|_| ()),
        }
    }

    fn print_value(&mut self, out: &mut String) -> Result<(), JsonError> {
        match self.peek() {
            Some(b'{') => self.print_object(out),
            Some(b'[') => {
                self.open(b'[', "an array")?;
                out.push('[');
                let mut first = true;
                while self.more(b']', first)? {
                    if !first {
                        out.push(',');
                    }
                    first = false;
                    self.print_value(out)?;
                }
                out.push(']');
                Ok(())
            }
            Some(b'"') => {
                let string = self.string()?;
                out.push('"');
                out.push_str(string.as_printed());
                out.push('"');
                Ok(())
            }
            _ => {
                let scalar = self.scalar()?;
                match scalar.as_bytes()[0] {
                    b'-' | b'0'..=b'9' => print_number(out, scalar),
                    _ => out.push_str(scalar),
                }
                Ok(())
            }
        }
    }

    fn print_object(&mut self, out: &mut String) -> Result<(), JsonError> {
        self.open(b'{', "an object")?;
        out.push('{');
        let start = out.len();
        let mut members: Vec<(JsonString, std::ops::Range<usize>)> = Vec::new();
        while self.more(b'}', members.is_empty())? {
            if !members.is_empty() {
                out.push(',');
            }
            let key = self.key()?;
            let from = out.len();
            out.push('"');
            out.push_str(key.as_printed());
            out.push_str("\":");
            self.print_value(out)?;
            members.push((key, from..out.len()));
        }
        if self.order != Order::Object || !is_in_javascript_order(&members, |(key, _)| key.as_printed()) {
            let printed = out[start..].to_owned();
            out.truncate(start);
            let mut ordered = in_javascript_order(members, |(key, _)| key.as_printed());
            match self.order {
                Order::Object => {}
                Order::Sorted => ordered.sort_by_cached_key(|(key, _)| sorted_place(key)),
                Order::SortedAsText => ordered.sort_by_cached_key(|(key, _)| sorting_key(key)),
            }
            for (index, (_, range)) in ordered.into_iter().enumerate() {
                if index > 0 {
                    out.push(',');
                }
                out.push_str(&printed[range.start - start..range.end - start]);
            }
        }
        out.push('}');
        Ok(())
    }

    /// `true`, `false`, `null` or a number.
    fn scalar(&mut self) -> Result<&'a str, JsonError> {
        let rest = &self.text[self.position..];
        for word in ["true", "false", "null"] {
            if rest.starts_with(word) {
                self.position += word.len();
                return Ok(word);
            }
        }
        let length = number_length(rest.as_bytes());
        if length == 0 {
            return self.syntax();
        }
        self.position += length;
        Ok(&rest[..length])
    }

    pub(super) fn string(&mut self) -> Result<JsonString, JsonError> {
        // Most strings are plain: they are copied whole.
        let rest = &self.text.as_bytes()[self.position + 1..];
        let plain = rest.iter().position(|byte| matches!(byte, b'"' | b'\\' | 0..=0x1f));
        if let Some(length) = plain
            && rest[length] == b'"'
        {
            let start = self.position + 1;
            self.position = start + length + 1;
            return Ok(JsonString(self.text[start..start + length].into()));
        }
        let mut printed = String::new();
        self.string_units(|unit| match unit {
            Ok(character) => print_char(&mut printed, character),
            Err(surrogate) => printed.push_str(&format!("\\u{surrogate:04x}")),
        })?;
        Ok(JsonString(printed.into_boxed_str()))
    }

    /// Steps over a string, and hands out its characters; a lone surrogate comes as the error.
    pub(super) fn string_units(&mut self, mut each: impl FnMut(Result<char, u16>)) -> Result<(), JsonError> {
        self.position += 1;
        let mut pending: Option<u16> = None;
        loop {
            let start = self.position;
            while !matches!(self.byte(), None | Some(b'"' | b'\\' | 0..=0x1f)) {
                self.position += 1;
            }
            if self.position > start {
                if let Some(high) = pending.take() {
                    each(Err(high));
                }
                self.text[start..self.position].chars().for_each(|character| each(Ok(character)));
            }
            match self.byte() {
                Some(b'"') => {
                    self.position += 1;
                    if let Some(high) = pending {
                        each(Err(high));
                    }
                    return Ok(());
                }
                Some(b'\\') => {
                    let unit = self.escape()?;
                    if let Some(high) = pending.take() {
                        if (0xdc00..0xe000).contains(&unit) {
                            let code = 0x10000 + (u32::from(high - 0xd800) << 10) + u32::from(unit - 0xdc00);
                            each(char::from_u32(code).ok_or(high));
                            continue;
                        }
                        each(Err(high));
                    }
                    match unit {
                        0xd800..0xdc00 => pending = Some(unit),
                        _ => each(char::from_u32(u32::from(unit)).ok_or(unit)),
                    }
                }
                _ => return self.syntax(),
            }
        }
    }

    /// The UTF-16 unit that an escape stands for.
    fn escape(&mut self) -> Result<u16, JsonError> {
        self.position += 1;
        let unit = match self.byte() {
            Some(b'"') => b'"'.into(),
            Some(b'\\') => b'\\'.into(),
            Some(b'/') => b'/'.into(),
            Some(b'b') => 8,
            Some(b'f') => 12,
            Some(b'n') => 10,
            Some(b'r') => 13,
            Some(b't') => 9,
            Some(b'u') => {
                let digits = self.text.as_bytes().get(self.position + 1..self.position + 5);
                let Some(digits) = digits.filter(|digits| digits.iter().all(u8::is_ascii_hexdigit)) else {
                    return self.syntax();
                };
                let unit = digits.iter().fold(0, |unit, digit| {
                    unit << 4 | char::from(*digit).to_digit(16).and_then(|digit| u16::try_from(digit).ok()).unwrap_or(0)
                });
                self.position += 4;
                unit
            }
            _ => return self.syntax(),
        };
        self.position += 1;
        Ok(unit)
    }
}

/// Prints one character of a string as `JSON.stringify` does.
pub(super) fn print_char(out: &mut String, character: char) {
    match character {
        '"' => out.push_str("\\\""),
        '\\' => out.push_str("\\\\"),
        '\u{8}' => out.push_str("\\b"),
        '\u{c}' => out.push_str("\\f"),
        '\n' => out.push_str("\\n"),
        '\r' => out.push_str("\\r"),
        '\t' => out.push_str("\\t"),
        '\0'..='\u{1f}' => out.push_str(&format!("\\u{:04x}", u32::from(character))),
        _ => out.push(character),
    }
}

/// The length of the number at the start of `bytes`, 0 when there is none (RFC 8259, section 6).
fn number_length(bytes: &[u8]) -> usize {
    let digits = |from: usize| bytes[from..].iter().take_while(|byte| byte.is_ascii_digit()).count();
    let mut length = usize::from(bytes.first() == Some(&b'-'));
    length += match bytes.get(length) {
        Some(b'0') => 1,
        Some(b'1'..=b'9') => digits(length),
        _ => return 0,
    };
    if bytes.get(length) == Some(&b'.') {
        match digits(length + 1) {
            0 => return 0,
            count => length += 1 + count,
        }
    }
    if let Some(b'e' | b'E') = bytes.get(length) {
        let sign = usize::from(matches!(bytes.get(length + 1), Some(b'+' | b'-')));
        match digits(length + 1 + sign) {
            0 => return 0,
            count => length += 1 + sign + count,
        }
    }
    length
}

/// Prints a number as JavaScript does; `1e999` is Infinity there, which JSON prints as `null`.
fn print_number(out: &mut String, text: &str) {
    // Up to 15 digits print as they are.
    let digits = text.strip_prefix('-').unwrap_or(text);
    if digits.len() <= 15 && digits.bytes().all(|byte| byte.is_ascii_digit()) && text != "-0" {
        out.push_str(text);
        return;
    }
    match text.parse::<f64>() {
        Ok(number) if number.is_finite() => out.push_str(ryu_js::Buffer::new().format(number)),
        _ => out.push_str("null"),
    }
}

/// The number that an index-like key stands for: those come first in every JavaScript object.
fn array_index(key: &str) -> Option<u32> {
    let canonical = key == "0" || (!key.starts_with('0') && !key.is_empty() && key.len() <= 10);
    if !canonical || !key.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    key.parse().ok().filter(|index| *index != u32::MAX)
}

/// Whether members stand as JavaScript would list them: no key twice, index-like ones first and ascending.
fn is_in_javascript_order<T>(members: &[T], key: impl Fn(&T) -> &str) -> bool {
    let indexed = members.iter().take_while(|member| array_index(key(member)).is_some()).count();
    let ascending = members[..indexed].windows(2).all(|pair| array_index(key(&pair[0])) < array_index(key(&pair[1])));
    let named = &members[indexed..];
    let unique = || {
        if named.len() <= 16 {
            named.iter().enumerate().all(|(at, one)| named[..at].iter().all(|other| key(one) != key(other)))
        } else {
            let mut seen = std::collections::HashSet::with_capacity(named.len());
            named.iter().all(|member| seen.insert(key(member)))
        }
    };
    ascending && named.iter().all(|member| array_index(key(member)).is_none()) && unique()
}

/// Puts members into the order of a JavaScript object: the last of equal keys, in the place of the first.
fn in_javascript_order<T>(members: Vec<T>, key: impl Fn(&T) -> &str) -> Vec<T> {
    if is_in_javascript_order(&members, &key) {
        return members;
    }
    let mut places: HashMap<String, usize> = HashMap::with_capacity(members.len());
    let mut ordered: Vec<T> = Vec::with_capacity(members.len());
    for member in members {
        match places.entry(key(&member).to_owned()) {
            std::collections::hash_map::Entry::Occupied(place) => ordered[*place.get()] = member,
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(ordered.len());
                ordered.push(member);
            }
        }
    }
    // A stable sort: named members keep the order in which they were first set.
    ordered.sort_by_key(|member| array_index(key(member)).map_or((1, 0), |index| (0, index)));
    ordered
}

/// What JavaScript sorts a key by: its UTF-16 units.
pub(crate) fn sorting_key(key: &JsonString) -> Vec<u16> {
    let quoted = key.to_string();
    let mut units = Vec::with_capacity(key.as_printed().len());
    let mut each = |unit: Result<char, u16>| match unit {
        Ok(character) => units.extend_from_slice(character.encode_utf16(&mut [0; 2])),
        Err(surrogate) => units.push(surrogate),
    };
    // The printed form parses: this module made it.
    let _ = Reader::new(&quoted).string_units(&mut each);
    units
}

/// Where a key stands in an object whose members were set in the order of their keys: index-like ones come first.
pub fn sorted_place(key: &JsonString) -> (u64, Vec<u16>) {
    match array_index(key.as_printed()) {
        Some(index) => (index.into(), Vec::new()),
        None => (u64::MAX, sorting_key(key)),
    }
}
