//! The escape key of a terminal: how a person talks to the VMM instead of the guest.

/// What a person asks the VMM for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ConsoleCommand {
    /// Stop the VM at once.
    Stop,
    /// Press the power button.
    PowerButton,
    /// Reset the guest.
    Reset,
    /// Leave the console; the VM goes on. The terminal has been given back already.
    Detach,
}

/// What comes of keystrokes after the escape key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EscapeAction {
    /// A command.
    Command(ConsoleCommand),
    /// Show what can be typed.
    Help,
}

/// Finds the escape key, and the key behind it, in what is typed.
#[derive(Debug)]
pub struct EscapeFilter {
    key: u8,
    /// The last byte was the escape key.
    armed: bool,
}

impl EscapeFilter {
    /// A filter for the control character `key`.
    pub const fn new(key: u8) -> Self {
        Self { key, armed: false }
    }

    /// What to press, as in `Ctrl-]`.
    pub fn key_name(&self) -> String {
        format!("Ctrl-{}", char::from(self.key ^ 0x40))
    }

    /// What can be typed.
    pub fn help(&self) -> String {
        let key = self.key_name();
        format!(
            "\r\n{key} then: q or x  stop the VM at once\r\n\
             \x20            p       press the power button\r\n\
             \x20            r       reset the guest\r\n\
             \x20            d       leave the console, the VM goes on\r\n\
             \x20            {key}  send {key} to the guest\r\n"
        )
    }

    /// Appends to `guest` what of `typed` is for the guest, and returns what is for the VMM.
    pub fn feed(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> Vec<EscapeAction> {
        let mut actions = Vec::new();
        for byte in typed {
            if !std::mem::take(&mut self.armed) {
                if *byte == self.key {
                    self.armed = true;
                } else {
                    guest.push(*byte);
                }
                continue;
            }
            actions.push(match byte.to_ascii_lowercase() {
                b'q' | b'x' => EscapeAction::Command(ConsoleCommand::Stop),
                b'p' => EscapeAction::Command(ConsoleCommand::PowerButton),
                b'r' => EscapeAction::Command(ConsoleCommand::Reset),
                b'd' => EscapeAction::Command(ConsoleCommand::Detach),
                _ if *byte == self.key => {
                    guest.push(self.key);
                    continue;
                }
                _ => EscapeAction::Help,
            });
        }
        actions
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn feed(filter: &mut EscapeFilter, typed: &[u8]) -> (Vec<u8>, Vec<EscapeAction>) {
        let mut guest = Vec::new();
        let actions = filter.feed(typed, &mut guest);
        (guest, actions)
    }

    #[test]
    fn other_keys_and_control_c_go_to_the_guest() {
        let mut filter = EscapeFilter::new(0x1d);
        assert_eq!(feed(&mut filter, b"ls\r\x03"), (b"ls\r\x03".to_vec(), vec![]));
    }

    #[test]
    fn the_key_behind_the_escape_key_is_a_command() {
        let mut filter = EscapeFilter::new(0x1d);
        for (key, command) in [
            (b'q', ConsoleCommand::Stop),
            (b'X', ConsoleCommand::Stop),
            (b'p', ConsoleCommand::PowerButton),
            (b'r', ConsoleCommand::Reset),
            (b'd', ConsoleCommand::Detach),
        ] {
            let expected = vec![EscapeAction::Command(command)];
            assert_eq!(
                feed(&mut filter, &[b'a', 0x1d, key, b'b']),
                (b"ab".to_vec(), expected)
            );
        }
        assert_eq!(feed(&mut filter, b"\x1d?"), (vec![], vec![EscapeAction::Help]));
        assert_eq!(feed(&mut filter, b"\x1dz"), (vec![], vec![EscapeAction::Help]));
    }

    #[test]
    fn the_keys_may_come_apart() {
        let mut filter = EscapeFilter::new(0x1d);
        assert_eq!(feed(&mut filter, b"a\x1d"), (b"a".to_vec(), vec![]));
        assert_eq!(
            feed(&mut filter, b"q").1,
            [EscapeAction::Command(ConsoleCommand::Stop)]
        );
    }

    #[test]
    fn the_escape_key_twice_is_sent_once() {
        let mut filter = EscapeFilter::new(0x1d);
        assert_eq!(feed(&mut filter, b"\x1d\x1dq"), (b"\x1dq".to_vec(), vec![]));
    }

    #[test]
    fn help_names_the_key() {
        assert!(EscapeFilter::new(0x1d).help().contains("Ctrl-]"));
        assert!(EscapeFilter::new(0x01).help().contains("Ctrl-A"));
    }
}
