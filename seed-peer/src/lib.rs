//! A headless GenosDB peer that stays in rooms and archives every operation.
