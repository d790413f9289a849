//! The built-in coding agent as a program of its own, for images.

use std::process::ExitCode;

fn main() -> ExitCode {
    worker::main(std::env::args_os().skip(1))
}
