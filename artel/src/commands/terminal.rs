//! Asking at the terminal.

use std::io::{BufRead, IsTerminal, Read, Write};

use ports::Plaintext;
use rustix::termios::{LocalModes, OptionalActions, tcgetattr, tcsetattr};

/// The most that is read of one value, in bytes.
const MOST: u64 = 64 * 1024 + 1;

/// Asks for a line; the default is taken for an empty one.
pub(super) fn ask(question: &str, default: Option<&str>) -> anyhow::Result<Option<String>> {
    let question = ports::plain(question);
    let mut out = std::io::stdout();
    match default {
        Some(default) => write!(out, "{question} [{default}]: ")?,
        None => write!(out, "{question}: ")?,
    }
    out.flush()?;
    let mut line = String::new();
    std::io::stdin().lock().take(MOST).read_line(&mut line)?;
    let line = line.trim();
    Ok(if line.is_empty() {
        default.map(str::to_owned)
    } else {
        Some(line.to_owned())
    })
}

/// Reads a secret: at a terminal without showing it, otherwise all of standard input.
pub(super) fn ask_secret(question: &str) -> anyhow::Result<Plaintext> {
    let stdin = std::io::stdin();
    let mut value = String::new();
    if stdin.is_terminal() {
        let question = ports::plain(question);
        print!("{question} (not shown): ");
        std::io::stdout().flush()?;
        let before = tcgetattr(&stdin)?;
        let mut silent = before.clone();
        silent.local_modes.remove(LocalModes::ECHO);
        tcsetattr(&stdin, OptionalActions::Flush, &silent)?;
        let read = stdin.lock().take(MOST).read_line(&mut value);
        tcsetattr(&stdin, OptionalActions::Flush, &before)?;
        println!();
        read?;
    } else {
        stdin.lock().take(MOST).read_to_string(&mut value)?;
    }
    let trimmed = value.trim_end_matches(['\n', '\r']).to_owned();
    anyhow::ensure!(!trimmed.is_empty(), "no value was given");
    Ok(Plaintext::new(trimmed))
}
