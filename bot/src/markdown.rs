//! Markdown, as the crew writes it, into the HTML that Telegram understands, in pieces that it accepts.

use pulldown_cmark::{CodeBlockKind, Event, Options, Parser, Tag, TagEnd};

/// Telegram's limit for the text of a message, in UTF-16 code units; counted in characters with room to spare.
const PIECE_CHARS: usize = 3500;

/// Escapes what has a meaning in Telegram's HTML.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// One piece of HTML for each message that the text needs, at least one. Every piece is complete HTML by itself.
pub fn to_messages(markdown: &str) -> Vec<String> {
    let mut pieces = Vec::new();
    let mut piece = String::new();
    for block in blocks(markdown) {
        if !piece.is_empty() && piece.chars().count() + block.chars().count() > PIECE_CHARS {
            pieces.push(std::mem::take(&mut piece));
        }
        if !piece.is_empty() {
            piece.push('\n');
        }
        if block.chars().count() > PIECE_CHARS {
            // A block that fits in no message loses its formatting, not its words.
            let letters: Vec<char> = plain(&block).chars().collect();
            for part in letters.chunks(PIECE_CHARS) {
                pieces.push(escape(&part.iter().collect::<String>()));
            }
        } else {
            piece.push_str(&block);
        }
    }
    if !piece.is_empty() || pieces.is_empty() {
        pieces.push(if piece.is_empty() {
            "…".to_owned()
        } else {
            piece
        });
    }
    pieces
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
                            block.push_str(&format!("<pre><code class=\"language-{word}\">"));
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
                                block.push_str(&format!("{number}. "));
                                *number += 1;
                            }
                            _ => block.push_str("• "),
                        }
                    }
                    Tag::Link { dest_url, .. } => {
                        let url = escape(&dest_url).replace('"', "&quot;");
                        block.push_str(&format!("<a href=\"{url}\">"));
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
                    TagEnd::Item => {
                        if !block.ends_with('\n') {
                            block.push('\n');
                        }
                    }
                    TagEnd::Paragraph => block.push('\n'),
                    TagEnd::Link => block.push_str("</a>"),
                    _ => {}
                }
                if depth == 0 {
                    out.push(std::mem::take(&mut block).trim_end().to_owned() + "\n");
                }
            }
            Event::Text(text) | Event::Html(text) | Event::InlineHtml(text) => {
                block.push_str(&escape(&text))
            }
            Event::Code(text) => block.push_str(&format!("<code>{}</code>", escape(&text))),
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
            .collect::<Vec<_>>()
            .join("\n\n");
        let pieces = to_messages(&long);
        assert!(pieces.len() > 1 && pieces.iter().all(|piece| piece.chars().count() <= 4096));
        let words: Vec<String> = plain(&pieces.join("\n"))
            .split_whitespace()
            .map(str::to_owned)
            .collect();
        assert_eq!(words, text);
        assert!(
            to_messages(&"x".repeat(10_000))
                .iter()
                .all(|piece| piece.chars().count() <= 4096)
        );
        assert_eq!(to_messages(""), ["…"]);
    }
}
