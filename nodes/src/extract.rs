//! Finds the JSON object in what a model wrote: bare, in a code fence, or with prose around it.

/// The first balanced JSON object in `text` that parses; else the first balanced one, whose parse error then says what is wrong.
pub(crate) fn json_object(text: &str) -> Option<&str> {
    let mut first = None;
    let mut from = 0;
    while let Some(at) = text[from..].find('{').map(|at| from + at) {
        let Some(end) = balanced_end(&text[at..]) else {
            // Unbalanced from here: a brace in prose may come before the object, so look further.
            from = at + 1;
            continue;
        };
        let candidate = &text[at..at + end];
        if serde_json::from_str::<serde::de::IgnoredAny>(candidate).is_ok() {
            return Some(candidate);
        }
        first.get_or_insert(candidate);
        from = at + 1;
        if from > MAX_SCAN_BYTES {
            break;
        }
    }
    first
}

/// How far into an answer an object may begin.
const MAX_SCAN_BYTES: usize = 64 * 1024;

/// Where the object that begins at the start of `text` ends, if it does; braces in strings do not count.
fn balanced_end(text: &str) -> Option<usize> {
    let mut depth = 0_usize;
    let mut in_string = false;
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        if in_string {
            match byte {
                _ if escaped => escaped = false,
                b'\\' => escaped = true,
                b'"' => in_string = false,
                _ => {}
            }
            continue;
        }
        match byte {
            b'"' => in_string = true,
            b'{' => depth += 1,
            b'}' => {
                depth = depth.checked_sub(1)?;
                if depth == 0 {
                    return Some(at + 1);
                }
            }
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_object_is_found_wherever_it_stands() {
        for text in [
            r#"{"a": 1}"#,
            "```json\n{\"a\": 1}\n```",
            "Here it is:\n```\n{\"a\": 1}\n```\nAnything else?",
            "I used {braces} first. {\"a\": 1} Done }",
            "An open { and then {\"a\": 1}",
        ] {
            assert_eq!(json_object(text), Some(r#"{"a": 1}"#), "{text}");
        }
        assert_eq!(
            json_object(r#"{"a": "}{\"", "b": {"c": []}} x"#),
            Some(r#"{"a": "}{\"", "b": {"c": []}}"#)
        );
    }

    #[test]
    fn prose_holds_no_object() {
        assert_eq!(json_object("I would rather talk about it."), None);
        assert_eq!(json_object("{\"a\": "), None);
        assert_eq!(json_object("{a: 1}"), Some("{a: 1}"));
    }
}
