//! Names and ids: what they may look like, and how they are made.

/// Longest name of a deployment, in bytes; leaves room for an instance's suffix within one DNS label.
pub const DEPLOYMENT_NAME_MAX: usize = 48;
/// Longest name of a node, in bytes.
pub const NODE_NAME_MAX: usize = 63;

/// Why a name was refused; the text is a sentence for the person who gave it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Invalid(pub String);

/// Checks a deployment's name: a DNS label that begins with a letter.
pub fn check_deployment_name(name: &str) -> Result<(), Invalid> {
    check_label(name, DEPLOYMENT_NAME_MAX)
}

/// Checks a node's name: a DNS label that begins with a letter.
pub fn check_node_name(name: &str) -> Result<(), Invalid> {
    check_label(name, NODE_NAME_MAX)
}

/// Checks an instance's id; a deployment's name, '-' and a suffix of six characters.
pub fn check_instance_id(id: &str) -> Result<(), Invalid> {
    check_label(id, DEPLOYMENT_NAME_MAX + 7)
}

fn check_label(name: &str, max: usize) -> Result<(), Invalid> {
    let wrong = |what: &str| {
        Err(Invalid(format!(
            "\"{}\" {what}: use 1 to {max} characters of a-z, 0-9 and '-', beginning with a letter and not ending with '-'",
            name.escape_default()
        )))
    };
    if name.is_empty() {
        return wrong("is empty");
    }
    if name.len() > max {
        return wrong("is too long");
    }
    if !name.starts_with(|c: char| c.is_ascii_lowercase()) {
        return wrong("does not begin with a letter");
    }
    if name.ends_with('-') {
        return wrong("ends with '-'");
    }
    if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-') {
        return wrong("has a character that is not allowed");
    }
    Ok(())
}

/// Id of an instance: the deployment's name and six characters made from `random`, without vowels or look-alikes.
#[must_use]
pub fn instance_id(deployment: &str, mut random: u64) -> String {
    const ALPHABET: &[u8; 27] = b"23456789bcdfghjkmnpqrstvwxz";
    let mut id = String::with_capacity(deployment.len() + 7);
    id.push_str(deployment);
    id.push('-');
    for _ in 0..6 {
        id.push(char::from(ALPHABET[(random % 27) as usize]));
        random /= 27;
    }
    id
}

/// Name of the deployment that an instance's id was made for; `None` when the id is none that [`instance_id`] makes.
#[must_use]
pub fn deployment_of(id: &str) -> Option<&str> {
    let (deployment, suffix) = id.rsplit_once('-')?;
    (suffix.len() == 6 && !deployment.is_empty()).then_some(deployment)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_bears_the_name_of_its_deployment() {
        assert_eq!(deployment_of(&instance_id("a-b", 7)), Some("a-b"));
        assert_eq!((deployment_of("tiny"), deployment_of("tiny-b"), deployment_of("-222222")), (None, None, None));
    }

    #[test]
    fn names_outside_the_rules_are_refused_with_the_rule() {
        for bad in ["", "-a", "a-", "A", "a_b", "ä", "a/b", "1a", &"x".repeat(49)] {
            let error = check_deployment_name(bad).unwrap_err();
            assert!(error.0.contains("1 to 48 characters"), "{error}");
        }
        for good in ["a", "qwen3-8b", &"x".repeat(48)] {
            check_deployment_name(good).unwrap();
        }
    }

    #[test]
    fn an_instance_id_passes_its_own_check() {
        for random in [0, 1, u64::MAX] {
            check_instance_id(&instance_id(&"x".repeat(48), random)).unwrap();
        }
        assert_ne!(instance_id("a", 1), instance_id("a", 2));
    }
}
