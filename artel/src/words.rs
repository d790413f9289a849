//! What commands say: the one place that prints. Words of programs, models and people have nothing in them there that a
//! terminal would obey.

/// Prints words as lines of standard output.
pub fn say(words: &str) {
    println!("{}", ports::plain(words));
}

/// Prints words as lines of standard error.
pub fn complain(words: &str) {
    eprintln!("{}", ports::plain(words));
}

/// Prints one JSON object as a line.
pub fn print_json(value: &impl serde::Serialize) {
    println!("{}", json_line(value));
}

/// One JSON object as a line. What a terminal would obey is written as `\u` and four digits, which means the same to programs.
pub fn json_line(value: &impl serde::Serialize) -> String {
    use std::fmt::Write as _;
    let text = serde_json::to_string(value).expect("what we print is plain data");
    let mut line = String::with_capacity(text.len());
    for c in text.chars() {
        // What is no ASCII, and DEL, stands inside of a string here; the other control characters are escaped already.
        if obeyed(c) {
            let _ = write!(line, "\\u{:04x}", u32::from(c));
        } else {
            line.push(c);
        }
    }
    line
}

/// Control characters, ends of lines, and marks of direction.
fn obeyed(c: char) -> bool {
    c.is_control()
        || matches!(
            c,
            '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        )
}

#[cfg(test)]
mod tests {
    use super::json_line;
    use serde_json::{Value, json};

    #[test]
    fn json_means_the_same_and_has_nothing_that_a_terminal_would_obey() {
        let words = "é 日本 🦀 \u{1b}[2J \u{9b}31m \u{7f} \u{202e}gpj.exe\u{2066} \u{200f}\u{61c} a\u{2028}b \\u202e \"q\"\n\t";
        let value = json!({ words: [words] });
        let line = json_line(&value);
        assert_eq!(serde_json::from_str::<Value>(&line).unwrap(), value);
        assert!(line.contains("é 日本 🦀 \\u001b[2J \\u009b31m \\u007f \\u202egpj.exe\\u2066"));
        assert!(!line.chars().any(super::obeyed), "{line}");
    }
}
