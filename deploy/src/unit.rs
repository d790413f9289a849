//! The systemd user service that starts the program after a reboot.

use std::io;
use std::path::{Path, PathBuf};

/// What the unit starts.
#[derive(Debug, Clone)]
pub struct Unit {
    /// The program.
    pub program: PathBuf,
    /// Its home folder (`ARTEL_HOME`).
    pub home: PathBuf,
    /// `PATH` for the program and what it starts.
    pub path: String,
}

/// What was written, and what a person has to run now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Installed {
    /// The unit's file.
    pub file: PathBuf,
    /// Commands to run, in this order.
    pub commands: Vec<String>,
}

/// The unit's name.
pub const NAME: &str = "artel.service";

impl Unit {
    /// The unit's text. Services of projects are started by the program but not stopped with it:
    /// only the main process is ended.
    pub fn text(&self) -> String {
        format!(
            "[Unit]\n\
             Description=Artel: a crew that plans, codes, reviews and deploys\n\
             After=network-online.target\n\
             \n\
             [Service]\n\
             Type=simple\n\
             ExecStart={} up\n\
             Environment={}\n\
             Environment={}\n\
             WorkingDirectory={}\n\
             Restart=on-failure\n\
             RestartSec=2\n\
             KillMode=process\n\
             TimeoutStopSec=30\n\
             \n\
             [Install]\n\
             WantedBy=default.target\n",
            // Only in a command are variables replaced.
            quoted(&self.program.display().to_string()).replace('$', "$$"),
            quoted(&format!("ARTEL_HOME={}", self.home.display())),
            quoted(&format!("PATH={}", self.path)),
            escaped(&self.home.display().to_string()),
        )
    }

    /// Writes the unit under a configuration folder, usually `~/.config`; doing it again replaces
    /// it.
    pub fn install(&self, configuration: &Path) -> io::Result<Installed> {
        let folder = configuration.join("systemd").join("user");
        std::fs::create_dir_all(&folder)?;
        let file = folder.join(NAME);
        crate::layout::replace(&file, self.text().as_bytes())?;
        Ok(Installed {
            file,
            commands: vec![
                "systemctl --user daemon-reload".to_owned(),
                format!("systemctl --user enable --now {NAME}"),
                // Without it, user services start at the first login, not at boot.
                "sudo loginctl enable-linger \"$USER\"".to_owned(),
            ],
        })
    }
}

/// A word as systemd reads it back.
fn quoted(word: &str) -> String {
    let word = escaped(word).replace('\\', "\\\\").replace('"', "\\\"");
    format!("\"{word}\"")
}

/// Percent signs are systemd's own.
fn escaped(word: &str) -> String {
    word.replace('%', "%%")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_is_written_and_says_what_to_run() {
        let directory = tempfile::tempdir().expect("directory");
        let unit = Unit {
            program: "/opt/my tools/artel".into(),
            home: "/home/a%b/.artel".into(),
            path: "/usr/bin:/bin".into(),
        };
        let installed = unit.install(directory.path()).expect("installed");
        let again = unit.install(directory.path()).expect("installed again");
        assert_eq!(installed, again);
        assert_eq!(
            installed.file,
            directory.path().join("systemd/user/artel.service")
        );
        let text = std::fs::read_to_string(&installed.file).expect("read");
        assert!(
            text.contains("ExecStart=\"/opt/my tools/artel\" up\n"),
            "{text}"
        );
        assert!(
            text.contains("Environment=\"ARTEL_HOME=/home/a%%b/.artel\"\n"),
            "{text}"
        );
        assert!(
            text.contains("WorkingDirectory=/home/a%%b/.artel\n"),
            "{text}"
        );
        assert!(text.contains("KillMode=process\n"), "{text}");
        assert!(
            installed
                .commands
                .iter()
                .any(|command| command.contains("enable-linger"))
        );
    }
}
