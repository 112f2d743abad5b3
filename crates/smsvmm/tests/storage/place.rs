//! A folder with empty files to put pools on, and the program run in it.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::Value;

/// A folder with empty files to put pools on, and the program run in it.
pub(crate) struct Place(pub(crate) tempfile::TempDir);

impl Place {
    pub(crate) fn new(files: &[&str]) -> Self {
        let place = Self(tempfile::tempdir().unwrap());
        for name in files {
            place.file(name);
        }
        place
    }

    /// As [`Self::new`], with a pool on these files, and a file `vm.toml` that names it.
    pub(crate) fn with_pool(files: &[&str]) -> Self {
        let place = Self::new(files);
        let made = place.good(&[&["pool", "create", "demo"], files].concat());
        let (_, lines) = made.split_once("\n\n").unwrap();
        fs::write(place.path("vm.toml"), lines).unwrap();
        place
    }

    pub(crate) fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn file(&self, name: &str) {
        File::create(self.path(name)).unwrap().set_len(64 << 20).unwrap();
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        smsvmm(self.0.path(), arguments)
    }

    /// What a command prints that succeeds.
    pub(crate) fn good(&self, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let (out, err) = text(&output);
        assert!(output.status.success(), "{arguments:?}: {out}{err}");
        out
    }

    /// The error of a command that fails with `status`.
    pub(crate) fn bad(&self, status: i32, arguments: &[&str]) -> String {
        let output = self.run(arguments);
        let (out, err) = text(&output);
        assert_eq!(output.status.code(), Some(status), "{arguments:?}: {out}{err}");
        err
    }

    pub(crate) fn json(&self, arguments: &[&str]) -> Value {
        let text = self.good(&[arguments, &["--json", "--config", "vm.toml"]].concat());
        serde_json::from_str(&text).unwrap()
    }

    /// A command on the pool of vm.toml.
    pub(crate) fn pool(&self, arguments: &[&str]) -> String {
        self.good(&[arguments, &["--config", "vm.toml"]].concat())
    }
}

pub(crate) fn smsvmm(folder: &Path, arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_smsvmm"))
        .args(arguments)
        .current_dir(folder)
        .env_remove("SMSVMM_LOG")
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

pub(crate) fn text(output: &Output) -> (String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (text(&output.stdout), text(&output.stderr))
}
