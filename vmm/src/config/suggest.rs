//! "Did you mean": the known word nearest to a misspelt one.

/// The choice that is at most two edits (a third of its length for short ones) away from `written`.
pub(super) fn did_you_mean<'a>(written: &str, choices: &[&'a str]) -> Option<&'a str> {
    if written.is_empty() || written.len() > 64 {
        return None;
    }
    let written = written.to_ascii_lowercase().replace('_', "-");
    choices
        .iter()
        .map(|choice| (distance(&written, choice), *choice))
        .filter(|(distance, choice)| *distance <= 2.min(choice.len().div_ceil(3)))
        .min()
        .map(|(_, choice)| choice)
}

/// Edits (insert, delete, replace, swap neighbours) that make `to` of `from`.
fn distance(from: &str, to: &str) -> usize {
    let from: Vec<char> = from.chars().collect();
    let to: Vec<char> = to.chars().collect();
    let mut rows = vec![vec![0; to.len() + 1]; from.len() + 1];
    for (i, row) in rows.iter_mut().enumerate() {
        row[0] = i;
    }
    rows[0] = (0..=to.len()).collect();
    for i in 1..=from.len() {
        for j in 1..=to.len() {
            let replace = rows[i - 1][j - 1] + usize::from(from[i - 1] != to[j - 1]);
            let mut best = replace.min(rows[i - 1][j] + 1).min(rows[i][j - 1] + 1);
            if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                best = best.min(rows[i - 2][j - 2] + 1);
            }
            rows[i][j] = best;
        }
    }
    rows[from.len()][to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_misses_are_found_and_far_ones_are_not() {
        let keys = ["id", "image", "read-only", "serial", "queues", "queue-size"];
        assert_eq!(did_you_mean("imgae", &keys), Some("image"));
        assert_eq!(did_you_mean("readonly", &keys), Some("read-only"));
        assert_eq!(did_you_mean("READ_ONLY", &keys), Some("read-only"));
        assert_eq!(did_you_mean("queue", &keys), Some("queues"));
        assert_eq!(did_you_mean("file", &keys), None);
        assert_eq!(did_you_mean("x", &keys), None);
        assert_eq!(did_you_mean("", &keys), None);
    }
}
