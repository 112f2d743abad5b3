//! Findings, and how they are shown.

use std::fmt;

use serde::Serialize;

/// How good or bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Level {
    /// As it should be.
    Ok,
    /// Guests run, but slower, or without what the finding names.
    Warn,
    /// No stock guest can boot.
    Fail,
}

/// One thing that was examined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What: "KVM", "huge pages", ...
    pub topic: &'static str,
    /// How good or bad.
    pub level: Level,
    /// What was found.
    pub detail: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
}

impl Finding {
    /// A good finding.
    pub fn ok(topic: &'static str, detail: impl Into<String>) -> Self {
        Self {
            topic,
            level: Level::Ok,
            detail: detail.into(),
            remedy: None,
        }
    }

    /// A finding that does not keep guests from running.
    pub fn warn(topic: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            topic,
            level: Level::Warn,
            detail: detail.into(),
            remedy: Some(remedy.into()).filter(|remedy: &String| !remedy.is_empty()),
        }
    }

    /// A finding that keeps guests from running. An empty remedy is none.
    pub fn fail(topic: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            topic,
            level: Level::Fail,
            detail: detail.into(),
            remedy: Some(remedy.into()).filter(|remedy: &String| !remedy.is_empty()),
        }
    }
}

/// Everything that was examined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order of importance.
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether a stock guest can boot here.
    pub fn can_boot(&self) -> bool {
        self.findings.iter().all(|finding| finding.level < Level::Fail)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self
            .findings
            .iter()
            .map(|finding| finding.topic.len())
            .max()
            .unwrap_or(0);
        for finding in &self.findings {
            let level = match finding.level {
                Level::Ok => "ok  ",
                Level::Warn => "warn",
                Level::Fail => "FAIL",
            };
            writeln!(formatter, "{level}  {:width$}  {}", finding.topic, finding.detail)?;
            if let Some(remedy) = &finding.remedy {
                writeln!(formatter, "      {:width$}  -> {remedy}", "")?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_failure_is_enough_and_warnings_are_not() {
        let mut report = Report {
            findings: vec![Finding::ok("a", "b"), Finding::warn("c", "d", "e")],
        };
        assert!(report.can_boot());
        report.findings.push(Finding::fail("topic", "g", "h"));
        assert!(!report.can_boot());
        assert_eq!(
            report.to_string(),
            "ok    a      b\nwarn  c      d\n             -> e\nFAIL  topic  g\n             -> h\n"
        );
    }
}
