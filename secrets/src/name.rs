//! What can name a secret, and what can be its value.

use crate::Error;

/// The longest value, in bytes.
pub const MAX_VALUE_BYTES: usize = 64 * 1024;

/// Whether this can name a secret: `[A-Z][A-Z0-9_]{0,63}`, since services find it in their environment under this name.
pub fn check_name(name: &str) -> Result<(), Error> {
    let fits = name.len() <= 64
        && name.starts_with(|first: char| first.is_ascii_uppercase())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_uppercase() || byte.is_ascii_digit() || byte == b'_');
    if fits {
        return Ok(());
    }
    // People paste values where a name belongs: only what is short and plain is repeated to them.
    let shown = if name.len() <= 24
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphabetic() || b"_- ".contains(&byte))
    {
        name.to_owned()
    } else {
        "this".to_owned()
    };
    Err(Error::Name(shown))
}

/// Whether this can be a value: 1 byte to 64 KiB, without zero bytes, since it becomes an environment variable.
pub fn check_value(name: &str, value: &ports::Plaintext) -> Result<(), Error> {
    let value = value.expose();
    let reason = if value.is_empty() {
        "it is empty"
    } else if value.len() > MAX_VALUE_BYTES {
        "it is longer than 64 KiB"
    } else if value.contains('\0') {
        "it holds a zero byte"
    } else {
        return Ok(());
    };
    Err(Error::Value {
        name: name.to_owned(),
        reason,
    })
}

#[cfg(test)]
mod tests {
    use ports::Plaintext;

    use super::*;

    #[test]
    fn a_name_is_an_environment_variables() {
        for good in ["A", "WEATHER_API_KEY", "K2", &"A".repeat(64)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in [
            "",
            "a",
            "_A",
            "2A",
            "A-B",
            "A B",
            "A\n",
            "É",
            &"A".repeat(65),
        ] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_value_given_as_a_name_is_not_repeated() {
        let message = check_name("hunter2-canary-5519").unwrap_err().to_string();
        assert!(!message.contains("canary"), "{message}");
        let message = check_name("weather key").unwrap_err().to_string();
        assert!(message.contains("weather key"), "{message}");
    }

    #[test]
    fn a_value_that_cannot_be_an_environment_variable_is_refused() {
        let says = |value: &str| {
            check_value("K", &Plaintext::new(value.to_owned()))
                .unwrap_err()
                .to_string()
        };
        assert!(says("").contains("empty"));
        assert!(says("canary\0").contains("zero byte"));
        assert!(!says("canary\0").contains("canary"));
        assert!(says(&"x".repeat(MAX_VALUE_BYTES + 1)).contains("64 KiB"));
        assert!(check_value("K", &Plaintext::new("x".repeat(MAX_VALUE_BYTES))).is_ok());
    }
}
