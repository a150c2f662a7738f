//! Signatures of the Security Manager (wire §6): who wrote an operation, so that others need not be believed.
//!
//! An identity is an Ethereum key. It signs the operation's JSON without `originEthAddress` and `signature`, with the
//! keys of every object sorted and without white space, as a personal message (EIP-191). The key is not sent along: it
//! is recovered from the signature, and its address (EIP-55) compared with the one that the operation names.

use std::fmt;

use secp256k1::ecdsa::{RecoverableSignature, RecoveryId};
use secp256k1::{Message, PublicKey, SECP256K1, SecretKey};
use sha3::{Digest as _, Keccak256};

use zeroize::{Zeroize as _, Zeroizing};

use crate::json::{self, Json, JsonError, JsonString, Members, Order};

/// The members that are not signed, since they say what the signature is.
const UNSIGNED: [&str; 2] = ["originEthAddress", "signature"];

/// The address of an Ethereum key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Address([u8; 20]);

impl Address {
    /// Parses an address; `None` unless it is `0x` and 40 digits of hex. Where the digits are of both cases, they must be
    /// the checksum that EIP-55 makes of them.
    pub fn parse(text: &str) -> Option<Self> {
        let digits = text.strip_prefix("0x")?;
        let address = Self(bytes(digits)?);
        let is_of_one_case = !digits.bytes().any(|digit| digit.is_ascii_uppercase())
            || !digits.bytes().any(|digit| digit.is_ascii_lowercase());
        (is_of_one_case || address.to_string() == text).then_some(address)
    }

    fn of(key: &PublicKey) -> Self {
        let hash: [u8; 32] = Keccak256::digest(&key.serialize_uncompressed()[1..]).into();
        let mut address = [0; 20];
        address.copy_from_slice(&hash[12..]);
        Self(address)
    }
}

impl fmt::Display for Address {
    /// Prints the address with its checksum (EIP-55).
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = hex(&self.0);
        let hash: [u8; 32] = Keccak256::digest(digits.as_bytes()).into();
        f.write_str("0x")?;
        for (index, digit) in digits.chars().enumerate() {
            let nibble = hash[index / 2] >> (4 * (1 - index % 2)) & 15;
            write!(f, "{}", if nibble >= 8 { digit.to_ascii_uppercase() } else { digit })?;
        }
        Ok(())
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// An operation is not signed by whom it says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SignatureError {
    /// The text is not a JSON object.
    #[error(transparent)]
    Json(#[from] JsonError),
    /// It says nothing of a signature, or not all that it must.
    #[error("not signed")]
    Unsigned,
    /// The signature or an address in it is malformed.
    #[error("malformed signature")]
    Malformed,
    /// The signature is another's, or of something else.
    #[error("forged signature")]
    Forged,
}

/// The text that the signature of `operation`, a JSON object, is of: its members in `order`, which is
/// [`Order::Sorted`] where we sign.
///
/// # Errors
/// [`JsonError`] when it is not a JSON object.
pub fn signed_text(operation: &str, order: Order) -> Result<String, JsonError> {
    let mut members: Vec<(JsonString, &str)> = Members::parse(operation)?.into_iter().collect();
    members.retain(|(name, _)| !UNSIGNED.contains(&name.as_printed()));
    match order {
        Order::Object => {}
        Order::Sorted => members.sort_by_cached_key(|(name, _)| json::sorted_place(name)),
        Order::SortedAsText => members.sort_by_cached_key(|(name, _)| json::sorting_key(name)),
    }
    let mut text = String::from("{");
    for (index, (name, value)) in members.into_iter().enumerate() {
        let comma = if index > 0 { "," } else { "" };
        text.push_str(&format!("{comma}{name}:{}", Json::parse_in(value, order)?));
    }
    text.push('}');
    Ok(text)
}

/// Says who signed `operation`, a JSON object.
///
/// # Errors
/// [`SignatureError`] when nobody did, or not the one whom it names.
pub fn verify(operation: &str) -> Result<Address, SignatureError> {
    let mut members = Members::parse(operation)?;
    let mut text = |name| -> Result<String, SignatureError> {
        let raw = members.take(name).ok_or(SignatureError::Unsigned)?;
        Ok(json::string(raw).map_err(|_| SignatureError::Malformed)?.as_printed().to_owned())
    };
    let (signature, address, user) = (text("signature")?, text("originEthAddress")?, text("originUser")?);
    let address = Address::parse(&address).ok_or(SignatureError::Malformed)?;
    // What is signed names the author as well: one address, or the other could be exchanged.
    if Address::parse(&user) != Some(address) {
        return Err(SignatureError::Forged);
    }
    let signature: [u8; 65] = signature.strip_prefix("0x").and_then(bytes).ok_or(SignatureError::Malformed)?;
    let recovery = match signature[64] {
        // Both spellings of the parity are in use.
        0 | 27 => RecoveryId::Zero,
        1 | 28 => RecoveryId::One,
        _ => return Err(SignatureError::Malformed),
    };
    let signature =
        RecoverableSignature::from_compact(&signature[..64], recovery).map_err(|_| SignatureError::Malformed)?;
    // Of the two signatures that stand for one, only the lower counts (EIP-2): or anybody could make another.
    let mut lower = signature.to_standard();
    lower.normalize_s();
    if lower != signature.to_standard() {
        return Err(SignatureError::Malformed);
    }
    let signs = |text: &str| {
        let key = SECP256K1.recover_ecdsa(&personal_message(text), &signature);
        key.is_ok_and(|key| Address::of(&key) == address)
    };
    let text = signed_text(operation, Order::Sorted)?;
    if signs(&text) {
        return Ok(address);
    }
    // Both orders of index-like keys name the same object, and libraries differ in which they print.
    let other = signed_text(operation, Order::SortedAsText)?;
    if other != text && signs(&other) { Ok(address) } else { Err(SignatureError::Forged) }
}

/// What is signed of a text: its hash as a personal message (EIP-191, version 0x45).
fn personal_message(text: &str) -> Message {
    let mut hash = personal_hash(text.len());
    hash.update(text);
    Message::from_digest(hash.finalize().into())
}

/// The hash of a personal message of `length` bytes, before its first.
fn personal_hash(length: usize) -> Keccak256 {
    let mut hash = Keccak256::new();
    hash.update(format!("\x19Ethereum Signed Message:\n{length}"));
    hash
}

/// How many bytes a mnemonic may have: 24 words of at most eight letters.
const MAX_MNEMONIC_BYTES: usize = 512;

/// Where the first account of an Ethereum wallet is (BIP-44).
const DERIVATION_PATH: &str = "m/44'/60'/0'/0/0";

/// A text is no identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Neither 64 digits of hex nor words.
    #[error("it is neither a key (0x and 64 digits of hex) nor a mnemonic (12 to 24 words)")]
    Neither,
    /// A key that no key is.
    #[error("the number is not a private key of Ethereum")]
    Key,
    /// Words of which one is not in the list, or whose last does not fit the others (BIP-39).
    #[error("the mnemonic is not one: a word is misspelled, missing, or out of place")]
    Mnemonic,
}

/// An identity of the Security Manager: a key, and the address that others know it by.
pub struct Identity {
    key: SecretKey,
    address: Address,
}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Identity({})", self.address)
    }
}

impl Drop for Identity {
    fn drop(&mut self) {
        self.key.non_secure_erase();
    }
}

impl Identity {
    /// Parses a private key (64 digits of hex, with or without `0x`) or a mnemonic (BIP-39 in English, of which the
    /// first account counts).
    ///
    /// # Errors
    /// [`IdentityError`], which says nothing of the text.
    pub fn parse(text: &str) -> Result<Self, IdentityError> {
        let text = text.trim();
        if text.contains(char::is_whitespace) { Self::from_mnemonic(text) } else { Self::from_key(text) }
    }

    fn from_key(text: &str) -> Result<Self, IdentityError> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let mut bytes: [u8; 32] = bytes(digits).ok_or(IdentityError::Neither)?;
        let identity = Self::of(&bytes);
        bytes.zeroize();
        identity
    }

    fn from_mnemonic(text: &str) -> Result<Self, IdentityError> {
        if text.len() > MAX_MNEMONIC_BYTES {
            return Err(IdentityError::Mnemonic);
        }
        let words = Zeroizing::new(text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase());
        let mnemonic =
            bip39::Mnemonic::parse_in(bip39::Language::English, words.as_str()).map_err(|_| IdentityError::Mnemonic)?;
        let seed = Zeroizing::new(mnemonic.to_seed(""));
        let path = DERIVATION_PATH.parse().map_err(|_| IdentityError::Key)?;
        let key = bip32::XPrv::derive_from_path(seed.as_slice(), &path).map_err(|_| IdentityError::Key)?;
        let bytes = Zeroizing::new(<[u8; 32]>::from(key.private_key().to_bytes()));
        Self::of(&bytes)
    }

    fn of(bytes: &[u8; 32]) -> Result<Self, IdentityError> {
        let key = SecretKey::from_byte_array(bytes).map_err(|_| IdentityError::Key)?;
        Ok(Self { address: Address::of(&key.public_key(SECP256K1)), key })
    }

    /// The identity's address.
    pub fn address(&self) -> Address {
        self.address
    }

    /// Signs `operation`, a JSON object, which may be signed already: what said so is exchanged.
    ///
    /// # Errors
    /// [`JsonError`] when it is not a JSON object.
    pub fn sign(&self, operation: &str) -> Result<String, JsonError> {
        let mut signed = String::from("{");
        for (name, value) in Members::parse(operation)? {
            if name.as_printed() != "originUser" && !UNSIGNED.contains(&name.as_printed()) {
                signed.push_str(&format!("{name}:{},", Json::parse(value)?));
            }
        }
        signed.push_str(&format!(r#""originUser":"{}""#, self.address));
        let text = signed_text(&format!("{signed}}}"), Order::Sorted)?;
        Ok(format!("{signed},{}}}", self.signature_of(&personal_message(&text))))
    }

    /// Signs a text that is too long to hold: `text` writes it, twice. Returns the members that say so, without
    /// `originUser`, which is part of the text.
    ///
    /// # Errors
    /// Those of `text`.
    pub fn sign_text<E>(&self, text: impl Fn(&mut dyn FnMut(&str)) -> Result<(), E>) -> Result<String, E> {
        let mut length = 0;
        text(&mut |part| length += part.len())?;
        let mut hash = personal_hash(length);
        text(&mut |part| hash.update(part))?;
        Ok(self.signature_of(&Message::from_digest(hash.finalize().into())))
    }

    fn signature_of(&self, message: &Message) -> String {
        let (recovery, compact) = SECP256K1.sign_ecdsa_recoverable(message, &self.key).serialize_compact();
        let parity = 27 + u8::try_from(i32::from(recovery)).unwrap_or(0);
        format!(r#""originEthAddress":"{}","signature":"0x{}{}""#, self.address, hex(&compact), hex(&[parity]))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that digits of hex stand for; `None` unless they are exactly so many.
fn bytes<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let digits = digits.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first key of the mnemonic in the vectors.
    const KEY: &str = "0xac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80";

    #[test]
    fn addresses_are_those_of_eip_55() {
        for text in [
            "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
            "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
            "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
            "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
        ] {
            let address = Address::parse(text).unwrap();
            assert_eq!(address.to_string(), text);
            assert_eq!(Address::parse(&text.to_lowercase()), Some(address));
        }
        for text in [
            "",
            "0x",
            "5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
            "0x5aaeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
            "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAe",
            "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAeg",
        ] {
            assert_eq!(Address::parse(text), None, "{text}");
        }
    }

    #[test]
    fn keys_are_sorted_at_every_depth() {
        let text =
            r#"{"b":{"z":[{"y":1,"x":2.50}],"a":"é\u0001"},"signature":"0x","a":1e3,"originEthAddress":"0x","B":null}"#;
        for order in [Order::Sorted, Order::SortedAsText] {
            let sorted = signed_text(text, order).unwrap();
            assert_eq!(sorted, r#"{"B":null,"a":1000,"b":{"a":"é\u0001","z":[{"x":2.5,"y":1}]}}"#);
            assert!(signed_text("[]", order).is_err() && signed_text("{", order).is_err());
        }
        let numbers = r#"{"$":{"10":1,"9":2,"-":3,"😀":4,"\uffff":5},"2":0}"#;
        assert_eq!(
            signed_text(numbers, Order::Sorted).unwrap(),
            "{\"2\":0,\"$\":{\"9\":2,\"10\":1,\"-\":3,\"😀\":4,\"\u{ffff}\":5}}"
        );
        assert_eq!(
            signed_text(numbers, Order::SortedAsText).unwrap(),
            "{\"$\":{\"-\":3,\"10\":1,\"9\":2,\"😀\":4,\"\u{ffff}\":5},\"2\":0}"
        );
    }

    #[test]
    fn an_identity_is_a_key_or_a_mnemonic() {
        let words = "test test test test test test test test test test test junk";
        let address = "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266";
        for text in [words, &format!("  {}\n", words.to_uppercase().replace(' ', "  ")), KEY, &KEY[2..]] {
            assert_eq!(Identity::parse(text).unwrap().address().to_string(), address);
        }
        for (text, error) in [
            ("", IdentityError::Neither),
            ("0x12", IdentityError::Neither),
            (&"0".repeat(64), IdentityError::Key),
            (&"f".repeat(64), IdentityError::Key),
            ("test test test test test test test test test test test test", IdentityError::Mnemonic),
            ("test test test", IdentityError::Mnemonic),
            (&"abandon ".repeat(1_000), IdentityError::Mnemonic),
        ] {
            assert_eq!(Identity::parse(text).unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn both_orders_of_index_like_keys_are_taken_for_the_same_object() {
        let identity = Identity::parse(KEY).unwrap();
        let operation = r#"{"type":"upsert","id":"a","value":{"10":1,"9":2},"timestamp":{"physical":5,"logical":1}}"#;
        let address = identity.address();
        let named = operation.replacen('{', &format!(r#"{{"originUser":"{address}","#), 1);
        for order in [Order::Sorted, Order::SortedAsText] {
            let text = signed_text(&named, order).unwrap();
            let members = identity.sign_text(|write| {
                text.split_inclusive(',').for_each(write);
                Ok::<_, JsonError>(())
            });
            let signed = named.replacen('{', &format!("{{{},", members.unwrap()), 1);
            assert_eq!(verify(&signed), Ok(address), "{order:?}");
        }
    }

    #[test]
    fn what_is_signed_verifies_and_what_is_changed_does_not() {
        let identity = Identity::parse(KEY).unwrap();
        assert_eq!(identity.address().to_string(), "0xf39Fd6e51aad88F6F4ce6aB8827279cffFb92266");
        let operation = r#"{"type":"upsert","id":"ä\"1","value":{"n":[1,2.5e-7,-0],"text":"☃"},"timestamp":{"physical":5,"logical":1}}"#;
        let signed = identity.sign(operation).unwrap();
        assert_eq!(verify(&signed), Ok(identity.address()));
        // Signed by another, it is the other's.
        let other = Identity::parse(&"11".repeat(32)).unwrap();
        assert_eq!(verify(&other.sign(&signed).unwrap()), Ok(other.address()));
        // The order of members means nothing; what they say does.
        for (from, to) in [
            ("upsert", "remove"),
            ("☃", "☂"),
            ("2.5e-7", "2.5e-8"),
            ("\"physical\":5", "\"physical\":6"),
            ("ä", "a"),
            ("{\"type\"", "{\"more\":1,\"type\""),
        ] {
            let forged = signed.replacen(from, to, 1);
            assert_ne!(forged, signed);
            assert_eq!(verify(&forged), Err(SignatureError::Forged), "{from}");
        }
        let (us, them) = (identity.address().to_string(), other.address().to_string());
        assert_eq!(verify(&signed.replace(&us, &them)), Err(SignatureError::Forged));
        assert_eq!(verify(&signed.replacen(&us, &them, 1)), Err(SignatureError::Forged));
        assert_eq!(verify(operation), Err(SignatureError::Unsigned));
        assert_eq!(verify(&signed.replace("\"signature\":\"0x", "\"signature\":\"0y")), Err(SignatureError::Malformed));
        assert!(format!("{identity:?}").len() < 60 && !format!("{identity:?}").contains("ac0974"));
    }

    proptest::proptest! {
        #[test]
        fn no_changed_bit_of_a_signature_is_accepted(bit in 0..65 * 8usize) {
            let identity = Identity::parse(KEY).unwrap();
            let signed = identity.sign(r#"{"type":"sync","timestamp":null}"#).unwrap();
            let at = signed.find("\"signature\":\"0x").unwrap() + 15;
            let mut raw: [u8; 65] = bytes(&signed[at..at + 130]).unwrap();
            raw[bit / 8] ^= 1 << (bit % 8);
            let changed = format!("{}{}{}", &signed[..at], hex(&raw), &signed[at + 130..]);
            // The parity byte has two spellings of each value: 27 and 28 are 0 and 1.
            proptest::prop_assert!(verify(&changed).is_err());
        }
    }
}
