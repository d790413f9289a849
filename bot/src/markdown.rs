//! Markdown, as the crew writes it, into the HTML that Telegram understands, in pieces that it accepts.

use std::fmt::Write as _;

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// How long a message may be, in UTF-16 code units with all its markup. Telegram's limit is 4096 without.
const PIECE_UNITS: usize = 3800;
/// How many messages one text may become.
const PIECES: usize = 8;

/// Escapes what has a meaning in Telegram's HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// One piece of HTML for each message that the text needs, at least one and at most eight; what goes beyond is cut, and the
/// last one says so. Every piece is complete HTML by itself. Whoever wrote it, nothing in it turns the writing around or is unseen.
pub fn to_messages(markdown: &str) -> Vec<String> {
    let markdown = &ports::plain(markdown);
    let mut pieces = Vec::new();
    let mut piece = String::new();
    for block in blocks(markdown) {
        if !piece.is_empty() && units(&piece) + 1 + units(&block) > PIECE_UNITS {
            pieces.push(std::mem::take(&mut piece));
        }
        if units(&block) > PIECE_UNITS {
            // A block that fits in no message loses its formatting, not its words; code stays code.
            let code = block.starts_with("<pre>");
            for part in parts(&plain(&block)) {
                pieces.push(if code {
                    format!("<pre>{part}</pre>")
                } else {
                    part
                });
            }
            continue;
        }
        if !piece.is_empty() {
            piece.push('\n');
        }
        piece.push_str(&block);
    }
    if !piece.trim().is_empty() {
        pieces.push(piece);
    }
    pieces.retain(|piece| !plain(piece).trim().is_empty());
    if pieces.is_empty() {
        pieces.push("…".to_owned());
    }
    if pieces.len() > PIECES {
        let cut = pieces.split_off(PIECES - 1);
        let letters: usize = cut.iter().map(|piece| plain(piece).chars().count()).sum();
        pieces.push(format!("… {letters} more characters are cut here."));
    }
    pieces
}

fn units(text: &str) -> usize {
    text.encode_utf16().count()
}

/// A long text, escaped, in parts that fit; divided at the end of a line or of a word where there is one.
fn parts(text: &str) -> Vec<String> {
    let room = PIECE_UNITS - "<pre></pre>".len();
    let mut parts = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (mut end, mut size, mut line, mut word) = (rest.len(), 0, None, None);
        for (at, c) in rest.char_indices() {
            size += match c {
                '&' => 5,
                '<' | '>' => 4,
                c => c.len_utf16(),
            };
            if size > room {
                end = line.or(word).unwrap_or(at);
                break;
            }
            // Not so early that the part is hardly begun.
            if size > room / 2 {
                match c {
                    '\n' => line = Some(at + 1),
                    ' ' => word = Some(at + 1),
                    _ => {}
                }
            }
        }
        let (part, tail) = rest.split_at(end);
        parts.push(escape(part));
        rest = tail;
    }
    parts
}

/// HTML of ours back into words, for servers that refuse the formatting.
pub fn plain(html: &str) -> String {
    let mut out = String::with_capacity(html.len());
    let mut in_tag = false;
    for c in html.chars() {
        match c {
            '<' => in_tag = true,
            '>' if in_tag => in_tag = false,
            c if !in_tag => out.push(c),
            _ => {}
        }
    }
    out.replace("&lt;", "<")
        .replace("&gt;", ">")
        .replace("&amp;", "&")
}

/// The text's top-level blocks, each as HTML.
fn blocks(markdown: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut block = String::new();
    let mut depth = 0usize;
    let mut lists: Vec<Option<u64>> = Vec::new();
    for event in Parser::new_ext(markdown, Options::ENABLE_STRIKETHROUGH) {
        match event {
            Event::Start(tag) => {
                depth += 1;
                match tag {
                    Tag::Heading { .. } | Tag::Strong => block.push_str("<b>"),
                    Tag::Emphasis => block.push_str("<i>"),
                    Tag::Strikethrough => block.push_str("<s>"),
                    Tag::BlockQuote(_) => block.push_str("<blockquote>"),
                    Tag::CodeBlock(kind) => match kind {
                        CodeBlockKind::Fenced(language) if !language.is_empty() => {
                            let word: String = language
                                .chars()
                                .filter(char::is_ascii_alphanumeric)
                                .collect();
                            let _ = write!(block, "<pre><code class=\"language-{word}\">");
                        }
                        _ => block.push_str("<pre><code>"),
                    },
                    Tag::List(first) => {
                        if !lists.is_empty() {
                            block.push('\n');
                        }
                        lists.push(first);
                    }
                    Tag::Item => {
                        block.push_str(&"  ".repeat(lists.len().saturating_sub(1)));
                        match lists.last_mut() {
                            Some(Some(number)) => {
                                let _ = write!(block, "{number}. ");
                                *number += 1;
                            }
                            _ => block.push_str("• "),
                        }
                    }
                    Tag::Link { dest_url, .. } => {
                        let url = escape(&dest_url).replace('"', "&quot;");
                        let _ = write!(block, "<a href=\"{url}\">");
                    }
                    _ => {}
                }
            }
            Event::End(tag) => {
                depth -= 1;
                match tag {
                    TagEnd::Heading(_) => block.push_str("</b>\n"),
                    TagEnd::Strong => block.push_str("</b>"),
                    TagEnd::Emphasis => block.push_str("</i>"),
                    TagEnd::Strikethrough => block.push_str("</s>"),
                    TagEnd::BlockQuote(_) => block.push_str("</blockquote>"),
                    TagEnd::CodeBlock => block.push_str("</code></pre>"),
                    TagEnd::List(_) => {
                        lists.pop();
                    }
                    TagEnd::Item if block.ends_with('\n') => {}
                    TagEnd::Item | TagEnd::Paragraph => block.push('\n'),
                    TagEnd::Link => block.push_str("</a>"),
                    _ => {}
                }
                if depth == 0 {
                    out.push(std::mem::take(&mut block).trim_end().to_owned() + "\n");
                }
            }
            Event::Text(text) | Event::Html(text) | Event::InlineHtml(text) => {
                block.push_str(&escape(&text));
            }
            Event::Code(text) => {
                let _ = write!(block, "<code>{}</code>", escape(&text));
            }
            Event::SoftBreak | Event::HardBreak => block.push('\n'),
            Event::Rule => out.push("———\n".to_owned()),
            _ => {}
        }
    }
    if !block.trim().is_empty() {
        out.push(block);
    }
    if let Some(last) = out.last_mut() {
        *last = last.trim_end().to_owned();
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markup_from_outside_is_text() {
        assert_eq!(
            to_messages("a <b>&</b> *c* `x<y`"),
            ["a &lt;b&gt;&amp;&lt;/b&gt; <i>c</i> <code>x&lt;y</code>"]
        );
    }

    #[test]
    fn what_a_client_would_obey_instead_of_showing_it_is_gone() {
        let hostile = format!(
            "the check said \u{1b}]0;title\u{7}\u{1b}[2J`user\u{202e}gpj.exe`\u{0} and {}",
            "x".repeat(1_000_000)
        );
        let messages = to_messages(&hostile);
        assert!(messages[0].starts_with("the check said"), "{}", messages[0]);
        assert!(messages.len() <= PIECES);
        for message in &messages {
            let obeyed = |c: char| (c.is_control() && c != '\n') || c == '\u{202e}';
            assert!(
                !message.contains(obeyed) && !message.contains("title"),
                "{message}"
            );
            assert!(units(message) <= 4096, "{}", units(message));
        }
        assert_eq!(
            to_messages("`user\u{202e}gpj.exe`\u{0}"),
            ["<code>usergpj.exe</code>"]
        );
    }

    #[test]
    fn lists_links_and_code_keep_their_form() {
        let html = to_messages("# Plan\n\n1. one\n2. [two](https://e.org/?a=1&b=2)\n\n- x\n  - y\n\n```sh\nls <a>\n```\n").join("|");
        for part in [
            "<b>Plan</b>",
            "1. one\n2. <a href=\"https://e.org/?a=1&amp;b=2\">two</a>",
            "• x\n  • y",
            "<pre><code class=\"language-sh\">ls &lt;a&gt;",
        ] {
            assert!(html.contains(part), "{part} in {html}");
        }
    }

    #[test]
    fn a_long_text_becomes_several_messages_without_losing_a_word() {
        let text = (0..3000).map(|n| format!("word{n}")).collect::<Vec<_>>();
        let long = text
            .chunks(20)
            .map(|words| words.join(" "))
            .collect::<Vec<_>>();
        for long in [long.join("\n\n"), long.join(" ")] {
            let pieces = to_messages(&long);
            assert!(pieces.len() > 1 && pieces.iter().all(|piece| units(piece) <= 4096));
            let words: Vec<String> = plain(&pieces.join("\n"))
                .split_whitespace()
                .map(str::to_owned)
                .collect();
            assert_eq!(words, text);
        }
    }

    #[test]
    fn letters_that_count_twice_and_markup_that_grows_stay_within_the_limit() {
        for letter in ["x", "&", "🦀", "`&`"] {
            let pieces = to_messages(&letter.repeat(9_000));
            assert!(pieces.len() > 1);
            assert!(
                pieces.iter().all(|piece| units(piece) <= 4096),
                "{letter}: {:?}",
                pieces.iter().map(|p| units(p)).collect::<Vec<_>>()
            );
        }
        let code = format!("```\n{}```\n", "let x = 1;\n".repeat(1000));
        assert!(
            to_messages(&code)
                .iter()
                .all(|piece| piece.starts_with("<pre>") && piece.ends_with("</pre>"))
        );
    }

    #[test]
    fn a_text_without_end_is_cut_and_says_so() {
        let pieces = to_messages(&"word ".repeat(100_000));
        assert_eq!(pieces.len(), PIECES);
        assert!(
            pieces[PIECES - 1].contains("are cut"),
            "{}",
            pieces[PIECES - 1]
        );
        assert_eq!(to_messages(""), ["…"]);
        assert_eq!(to_messages("\n \n"), ["…"]);
    }
}
