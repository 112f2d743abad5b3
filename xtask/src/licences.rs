//! May we use what we build with? Each package's SPDX expression against the allow-list in `deny.toml`.
//!
//! `cargo deny` does this and more where it is installed; this check needs nothing but cargo.

use anyhow::{Context as _, Result, bail, ensure};
use serde::Deserialize;

use crate::build;

#[derive(Deserialize)]
struct Deny {
    licenses: Licenses,
}

#[derive(Deserialize)]
struct Licenses {
    allow: Vec<String>,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    license: Option<String>,
}

/// Checks every package in Cargo.lock that is built for our target; returns how many there are.
pub(crate) fn check() -> Result<usize> {
    let path = lab::repository().join("deny.toml");
    let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
    let allowed = toml::from_str::<Deny>(&text)
        .context("deny.toml is not right")?
        .licenses
        .allow;
    let mut command = build::cargo();
    command.args([
        "metadata",
        "--format-version=1",
        "--locked",
        "--filter-platform=x86_64-unknown-linux-gnu",
    ]);
    let metadata: Metadata = serde_json::from_slice(&lab::finish(&mut command)?)?;
    let mut refused = Vec::new();
    for Package {
        name,
        version,
        license,
    } in &metadata.packages
    {
        let verdict = match license {
            None => Err(anyhow::anyhow!("it tells no licence")),
            Some(expression) => allows(expression, &allowed),
        };
        match verdict {
            Ok(true) => {}
            Ok(false) => refused.push(format!(
                "{name} {version}: {}",
                license.as_deref().unwrap_or_default()
            )),
            Err(error) => refused.push(format!("{name} {version}: {error:#}")),
        }
    }
    ensure!(
        refused.is_empty(),
        "licences that deny.toml does not allow:\n  {}",
        refused.join("\n  ")
    );
    Ok(metadata.packages.len())
}

/// Whether an SPDX expression (SPDX 2.3 annex D; `/` is an old way to write OR) can be satisfied by allowed licences.
fn allows(expression: &str, allowed: &[String]) -> Result<bool> {
    let spaced = expression
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut rest = words.as_slice();
    let verdict =
        any(&mut rest, allowed).with_context(|| format!("cannot read the licence {expression:?}"))?;
    ensure!(rest.is_empty(), "cannot read the licence {expression:?}");
    Ok(verdict)
}

fn any(words: &mut &[&str], allowed: &[String]) -> Result<bool> {
    let mut verdict = all(words, allowed)?;
    while next_if(words, "OR") {
        verdict |= all(words, allowed)?;
    }
    Ok(verdict)
}

fn all(words: &mut &[&str], allowed: &[String]) -> Result<bool> {
    let mut verdict = one(words, allowed)?;
    while next_if(words, "AND") {
        verdict &= one(words, allowed)?;
    }
    Ok(verdict)
}

fn one(words: &mut &[&str], allowed: &[String]) -> Result<bool> {
    if next_if(words, "(") {
        let verdict = any(words, allowed)?;
        ensure!(next_if(words, ")"), "a parenthesis is not closed");
        return Ok(verdict);
    }
    let Some((name, rest)) = words.split_first() else {
        bail!("it ends too early")
    };
    *words = rest;
    let mut name = (*name).to_owned();
    if next_if(words, "WITH") {
        let Some((exception, rest)) = words.split_first() else {
            bail!("it ends too early")
        };
        *words = rest;
        name = format!("{name} WITH {exception}");
    }
    Ok(allowed.contains(&name))
}

fn next_if(words: &mut &[&str], wanted: &str) -> bool {
    match words.split_first() {
        Some((word, rest)) if *word == wanted => {
            *words = rest;
            true
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_judged_as_spdx_says() {
        let allowed = [
            "MIT",
            "Apache-2.0",
            "Unicode-3.0",
            "Apache-2.0 WITH LLVM-exception",
        ]
        .map(str::to_owned);
        for (expression, expected) in [
            ("MIT", true),
            ("GPL-2.0-only", false),
            ("MIT OR GPL-2.0-only", true),
            ("MIT AND GPL-2.0-only", false),
            ("(MIT OR Apache-2.0) AND Unicode-3.0", true),
            ("(GPL-2.0-only OR LGPL-2.1-or-later) AND MIT", false),
            ("GPL-2.0-only/MIT", true),
            ("Apache-2.0 WITH LLVM-exception OR GPL-2.0-only", true),
            ("Apache-2.0 WITH other-exception", false),
        ] {
            assert_eq!(allows(expression, &allowed).unwrap(), expected, "{expression}");
        }
        assert!(allows("(MIT", &allowed).is_err());
        assert!(allows("MIT MIT", &allowed).is_err());
    }
}
