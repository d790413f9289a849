//! The forms in which a value turns up in texts: as it is, and as programs encode it.

use std::fmt::Write as _;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use zeroize::Zeroizing;

use crate::redactor::SHORTEST_REDACTED_BYTES;

/// A line of a longer value is a form of its own from this length on, in bytes: logs are written line by line.
const SHORTEST_LINE_BYTES: usize = 12;

/// Every form of `value`, without repetitions.
pub(crate) fn of(value: &str) -> Vec<Zeroizing<String>> {
    let mut forms: Vec<Zeroizing<String>> = Vec::new();
    let mut add = |form: String| {
        let form = Zeroizing::new(form);
        if form.len() >= SHORTEST_REDACTED_BYTES && !forms.contains(&form) {
            forms.push(form);
        }
    };
    add(value.to_owned());
    add(value.trim().to_owned());
    add(json(value));
    add(json_ascii(value));
    add(debug(value));
    add(html(value));
    for upper in [true, false] {
        add(percent(value, upper, false));
        add(percent(value, upper, true));
        add(hex(value, upper));
    }
    base64(value, &mut add);
    if value.trim().contains('\n') {
        for line in value.lines().map(str::trim) {
            if line.len() >= SHORTEST_LINE_BYTES && !line.starts_with("-----") {
                add(line.to_owned());
            }
        }
    }
    forms
}

fn json(value: &str) -> String {
    let quoted = Zeroizing::new(serde_json::to_string(value).expect("a string becomes JSON"));
    quoted[1..quoted.len() - 1].to_owned()
}

/// As Python's `json.dumps` writes it: everything beyond ASCII as `\uXXXX`.
fn json_ascii(value: &str) -> String {
    let quoted = Zeroizing::new(json(value));
    let mut out = String::with_capacity(quoted.len() * 2);
    for c in quoted.chars() {
        if c.is_ascii() {
            out.push(c);
        } else {
            for unit in c.encode_utf16(&mut [0; 2]) {
                let _ = write!(out, "\\u{unit:04x}");
            }
        }
    }
    out
}

fn debug(value: &str) -> String {
    let quoted = Zeroizing::new(format!("{value:?}"));
    quoted[1..quoted.len() - 1].to_owned()
}

fn html(value: &str) -> String {
    value
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn percent(value: &str, upper: bool, plus_for_space: bool) -> String {
    let mut out = String::with_capacity(value.len() * 3);
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else if plus_for_space && byte == b' ' {
            out.push('+');
        } else if upper {
            let _ = write!(out, "%{byte:02X}");
        } else {
            let _ = write!(out, "%{byte:02x}");
        }
    }
    out
}

fn hex(value: &str, upper: bool) -> String {
    let mut out = String::with_capacity(value.len() * 2);
    for byte in value.bytes() {
        let _ = if upper {
            write!(out, "{byte:02X}")
        } else {
            write!(out, "{byte:02x}")
        };
    }
    out
}

/// Base64 of the value wherever it stands within what is encoded (as in `user:value`): for each of the three alignments
/// those characters that its neighbours do not change.
fn base64(value: &str, add: &mut impl FnMut(String)) {
    for shift in 0..3_usize {
        let mut bytes = Zeroizing::new(vec![0; shift]);
        bytes.extend_from_slice(value.as_bytes());
        let start = (shift * 8).div_ceil(6);
        let end = bytes.len() * 8 / 6;
        if end.saturating_sub(start) < SHORTEST_REDACTED_BYTES {
            continue;
        }
        for engine in [&STANDARD_NO_PAD, &URL_SAFE_NO_PAD] {
            let encoded = Zeroizing::new(engine.encode(&*bytes));
            add(encoded[start..end].to_owned());
            if shift == 0 {
                // Standing alone, its last character is known as well.
                add(encoded.to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_without_special_characters_has_few_forms() {
        let forms = of("abcdefgh");
        assert!(forms.len() <= 7, "{}", forms.len());
    }

    #[test]
    fn lines_of_a_long_value_are_forms_but_its_frame_is_not() {
        let value =
            "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkq\nshort\n-----END PRIVATE KEY-----\n";
        let forms = of(value);
        assert!(forms.iter().any(|form| form.as_str() == "MIIEvQIBADANBgkq"));
        assert!(
            !forms
                .iter()
                .any(|form| form.as_str() == "short"
                    || form.as_str() == "-----BEGIN PRIVATE KEY-----")
        );
    }
}
