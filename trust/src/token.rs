//! Tokens: what a machine or a command line shows to a head the first time, and by what it knows that head.
//!
//! `phxt-ID-SECRET-PIN`: the id names the token in lists, the secret proves it, the pin is the SHA-256 of the certificate of
//! the cluster's authority. Whoever holds a token thus knows the head without having met it.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use crate::{from_hex, to_hex};

const PREFIX: &str = "phxt";
const ID_DIGITS: usize = 8;
const SECRET_DIGITS: usize = 32;

/// SHA-256 of the certificate of a cluster's authority.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Pin([u8; 32]);

impl Pin {
    /// The pin of a certificate in DER.
    pub fn of(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

impl fmt::Display for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&to_hex(&self.0))
    }
}

impl fmt::Debug for Pin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pin({self})")
    }
}

/// A text that is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("this is no token: `coordinator token create` prints one, phxt-ID-SECRET-PIN")]
pub struct TokenError;

/// A token with its secret.
#[derive(Clone, PartialEq, Eq)]
pub struct Token {
    id: String,
    secret: String,
    pin: Pin,
}

impl Token {
    /// A new one for the authority with this pin.
    pub fn new(pin: Pin) -> Self {
        let id = secret()[..ID_DIGITS].to_owned();
        Self { id, secret: secret()[..SECRET_DIGITS].to_owned(), pin }
    }

    /// Its name in lists.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What the head keeps of it.
    pub fn hash(&self) -> String {
        to_hex(&Sha256::digest(self.secret.as_bytes()))
    }

    /// The authority that it names.
    pub fn pin(&self) -> Pin {
        self.pin
    }

    /// The text for whoever it is for.
    pub fn reveal(&self) -> String {
        format!("{PREFIX}-{}-{}-{}", self.id, self.secret, self.pin)
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let parts: Vec<&str> = text.trim().split('-').collect();
        let &[PREFIX, id, secret, pin] = parts.as_slice() else { return Err(TokenError) };
        let is_hex = |text: &str, num: usize| text.len() == num && text.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !is_hex(id, ID_DIGITS) || !is_hex(secret, SECRET_DIGITS) {
            return Err(TokenError);
        }
        let pin = from_hex(pin).and_then(|bytes| bytes.try_into().ok()).map(Pin).ok_or(TokenError)?;
        Ok(Self { id: id.to_owned(), secret: secret.to_owned(), pin })
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Token({})", self.id)
    }
}

/// 64 hexadecimal digits that nobody can guess.
pub fn secret() -> String {
    let mut hash = Sha256::new();
    hash.update(uuid::Uuid::new_v4().as_bytes());
    hash.update(uuid::Uuid::new_v4().as_bytes());
    to_hex(&hash.finalize())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_hides() {
        let token = Token::new(Pin::of(b"a certificate"));
        let text = token.reveal();
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token.clone()));
        assert!(!format!("{token:?}").contains(&token.secret));
        assert_ne!(Token::new(token.pin).hash(), token.hash());
        for bad in
            ["", "phxt", &text[1..], &text[..text.len() - 1], &text.replace("phxt", "phxu"), &format!("{text}-1")]
        {
            assert_eq!(bad.parse::<Token>(), Err(TokenError), "{bad}");
        }
    }
}
