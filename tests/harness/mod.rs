//! Starts clusters of real processes for the tests that cross rooms.
