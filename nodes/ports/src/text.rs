//! The words of others (programs, models, people) as people may see them, on a terminal or in a chat.

/// Longest string that a terminal would take as a command, in characters; what is longer is text after all.
const MAX_SEQUENCE: usize = 4096;

/// Text without what only a terminal would act on: its escape sequences, control characters but line ends and tabs, and marks
/// that turn the direction of writing around. A carriage return begins a new line.
///
/// It is for where words leave to people, and for where a program's output is taken in. Text that it made is left as it is.
pub fn plain(text: &str) -> String {
    let mut kept = String::with_capacity(text.len());
    let mut rest = text.chars();
    while let Some(c) = rest.next() {
        match c {
            '\u{1b}' => skip(&mut rest),
            '\u{9b}' => control(&mut rest),
            '\u{90}' | '\u{98}' | '\u{9d}'..='\u{9f}' => string(&mut rest),
            '\r' => {
                if !rest.as_str().starts_with('\n') {
                    kept.push('\n');
                }
            }
            '\u{2028}' | '\u{2029}' => kept.push('\n'),
            '\n' | '\t' => kept.push(c),
            '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => {}
            c if c.is_control() => {}
            c => kept.push(c),
        }
    }
    kept
}

/// What follows an escape character.
fn skip(rest: &mut std::str::Chars<'_>) {
    let mut ahead = rest.clone();
    match ahead.next() {
        Some('[') => {
            *rest = ahead;
            control(rest);
        }
        Some(']' | 'P' | 'X' | '^' | '_') => {
            *rest = ahead;
            string(rest);
        }
        Some(' '..='/') => {
            // A set of characters is chosen by one more, or a few.
            *rest = ahead;
            let after = rest
                .as_str()
                .trim_start_matches(|c| (' '..='/').contains(&c));
            *rest = after.chars();
            if after.starts_with(|c| ('0'..='~').contains(&c)) {
                rest.next();
            }
        }
        Some('0'..='~') => *rest = ahead,
        _ => {}
    }
}

/// A control sequence: parameters and a letter.
fn control(rest: &mut std::str::Chars<'_>) {
    let after = rest
        .as_str()
        .trim_start_matches(|c| (' '..='?').contains(&c));
    let skipped = rest.as_str().len() - after.len();
    if skipped > MAX_SEQUENCE {
        return;
    }
    *rest = after.chars();
    if after.starts_with(|c| ('@'..='~').contains(&c)) {
        rest.next();
    }
}

/// A string for the terminal, up to its end. One without an end in its line is text: nobody hides the rest of a log this way.
fn string(rest: &mut std::str::Chars<'_>) {
    let mut ahead = rest.clone();
    for _ in 0..MAX_SEQUENCE {
        match ahead.next() {
            Some('\u{7}' | '\u{9c}') => {
                *rest = ahead;
                return;
            }
            Some('\u{1b}') if ahead.as_str().starts_with('\\') => {
                ahead.next();
                *rest = ahead;
                return;
            }
            None | Some('\n' | '\r') => return,
            Some(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn what_a_terminal_would_obey_is_gone_and_words_stay() {
        for (text, expected) in [
            ("plain\ttext\nand é 🦀", "plain\ttext\nand é 🦀"),
            ("\u{1b}[1;31mred\u{1b}[0m", "red"),
            ("\u{1b}[2J\u{1b}[Hcleared", "cleared"),
            ("\u{1b}]0;title\u{7}after", "after"),
            ("\u{1b}]52;c;ZXZpbA==\u{1b}\\copied", "copied"),
            (
                "\u{1b}]8;;https://evil.example\u{1b}\\link\u{1b}]8;;\u{1b}\\",
                "link",
            ),
            ("\u{1b}P+q\u{1b}\\asked", "asked"),
            ("\u{1b}(0lines\u{1b}(B", "lines"),
            ("\u{1b}creset\u{1b}7", "reset"),
            ("\u{9b}31mc1\u{9d}x\u{9c}y", "c1y"),
            ("bell\u{7}\u{8}\u{0}\u{7f}", "bell"),
            ("10%\r20%\r\ndone", "10%\n20%\ndone"),
            ("user\u{202e}gpj.exe\u{2066}", "usergpj.exe"),
            ("a\u{2028}b", "a\nb"),
            // Without an end it hides nothing.
            ("\u{1b}]0;open\nnext", "0;open\nnext"),
            ("\u{1b}", ""),
            ("\u{1b}[", ""),
            ("\u{1b}\u{1b}[1mx", "x"),
        ] {
            assert_eq!(plain(text), expected, "{text:?}");
            assert_eq!(plain(expected), expected);
        }
    }
}
