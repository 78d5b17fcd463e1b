//! Order and text of fencing tokens.

use crate::v1::Token;
use std::{cmp::Ordering, fmt, str::FromStr};

/// Tokens are ordered by the store's generation first: revisions alone go backwards when a store is restored.
impl PartialOrd for Token {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Token {
    fn cmp(&self, other: &Self) -> Ordering {
        (self.generation, self.revision).cmp(&(other.generation, other.revision))
    }
}

/// `<generation>.<revision>`, as in keys, file names and logs.
impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.generation, self.revision)
    }
}

/// A text that is no token.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("\"{0}\" is no token: expected <generation>.<revision>")]
pub struct Invalid(String);

impl FromStr for Token {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let parsed = text.split_once('.').and_then(|(generation, revision)| {
            Some(Self { generation: generation.parse().ok()?, revision: revision.parse().ok()? })
        });
        parsed.ok_or_else(|| Invalid(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_later_generation_beats_a_higher_revision() {
        let before = Token { generation: 1, revision: 900 };
        let after = Token { generation: 2, revision: 15 };
        assert!(after > before);
        assert_eq!(after.to_string().parse::<Token>(), Ok(after));
        assert!("7".parse::<Token>().is_err());
    }
}
