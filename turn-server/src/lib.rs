//! A STUN and TURN server.
