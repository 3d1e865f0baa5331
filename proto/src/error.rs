//! What a peer can get wrong.

/// A message that cannot be taken.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// A message without its content.
    #[error("message {message} lacks {field}")]
    Missing {
        /// The message's name.
        message: &'static str,
        /// The field that is absent.
        field: &'static str,
    },
    /// A value outside its range.
    #[error("{field} is {value}, which is not {expected}")]
    Invalid {
        /// The field's name.
        field: &'static str,
        /// What came.
        value: String,
        /// What is allowed.
        expected: &'static str,
    },
}
