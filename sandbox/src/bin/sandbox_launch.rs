//! [`sandbox::launcher`] as a program of its own.

fn main() -> std::process::ExitCode {
    sandbox::launcher::main(std::env::args_os().skip(1))
}
