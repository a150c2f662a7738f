//! The archive against the merge rules in memory.
