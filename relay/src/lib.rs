//! A Nostr relay made for signalling.
