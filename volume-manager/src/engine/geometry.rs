//! Where a byte of a section lies: arithmetic only.
//!
//! A section of *n* columns, *p* of them parity, is an array of rows; a row has one unit of every column. In row *r* (counted
//! from the section's `rotation`) the parity units rotate as in Linux md's left-symmetric layout: with one parity,
//! P is in column *n* − 1 − *r* mod *n*; with two, Q is in the column after P's (cyclically). Data units follow the last parity
//! unit, cyclically. So sequential reads use all columns in turn.
//!
//! ```text
//!   raid5, n = 4            raid6, n = 5
//!   row 0   0  1  2  P      row 0   1  2  3? …   P = n-1, Q = 0: data 0 1 2 in columns 1 2 3
//!   row 1   4  5  P  3      row 1   Q = 4, P = 3: data 3 4 5 in columns 0 1 2
//!   row 2   8  P  6  7
//! ```

/// Shape of a section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Shape {
    /// All columns.
    pub(crate) columns: usize,
    /// Of them parity.
    pub(crate) parity: usize,
    /// Bytes per column and row.
    pub(crate) unit: u64,
    /// Row number of the first row.
    pub(crate) rotation: u64,
}

/// A run of bytes that lies in one unit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Row, counted from the section's start.
    pub(crate) row: u64,
    /// Number of the data unit within its row.
    pub(crate) data: usize,
    /// First byte within the unit.
    pub(crate) within: u64,
    /// Bytes.
    pub(crate) length: u64,
}

impl Shape {
    /// Data units per row.
    pub(crate) fn data(&self) -> usize {
        self.columns - self.parity
    }

    /// Bytes of the section per row.
    pub(crate) fn row_bytes(&self) -> u64 {
        self.data() as u64 * self.unit
    }

    /// The column that holds parity number `index` (0 is P, 1 is Q) in `row`.
    pub(crate) fn parity_column(&self, row: u64, index: usize) -> usize {
        let columns = self.columns as u64;
        let turn = (row + self.rotation) % columns;
        let column = (columns - 1 - turn + index as u64) % columns;
        usize::try_from(column).unwrap_or(0)
    }

    /// The column that holds data unit number `data` in `row`.
    pub(crate) fn data_column(&self, row: u64, data: usize) -> usize {
        if self.parity == 0 {
            return data;
        }
        (self.parity_column(row, self.parity - 1) + 1 + data) % self.columns
    }

    /// What `column` holds in `row`.
    pub(crate) fn role(&self, row: u64, column: usize) -> Role {
        for index in 0..self.parity {
            if self.parity_column(row, index) == column {
                return Role::Parity(index);
            }
        }
        (0..self.data())
            .find(|data| self.data_column(row, *data) == column)
            .map_or(Role::Parity(0), Role::Data)
    }

    /// The piece with byte `offset` of the section, of at most `length` bytes.
    pub(crate) fn piece(&self, offset: u64, length: u64) -> Piece {
        let row = offset / self.row_bytes();
        let in_row = offset % self.row_bytes();
        let within = in_row % self.unit;
        Piece {
            row,
            data: usize::try_from(in_row / self.unit).unwrap_or(0),
            within,
            length: length.min(self.unit - within),
        }
    }

    /// Byte of a column's members where `piece` begins.
    pub(crate) fn in_member(&self, piece: &Piece) -> u64 {
        piece.row * self.unit + piece.within
    }
}

/// What a unit of a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// Data unit of this number.
    Data(usize),
    /// P (0) or Q (1).
    Parity(usize),
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(columns: usize, parity: usize, rows: u64) -> Vec<String> {
        let shape = Shape {
            columns,
            parity,
            unit: 4096,
            rotation: 0,
        };
        (0..rows)
            .map(|row| {
                let unit = |column| match shape.role(row, column) {
                    Role::Data(data) => (row * shape.data() as u64 + data as u64).to_string(),
                    Role::Parity(index) => ["P", "Q"][index].to_owned(),
                };
                (0..columns).map(unit).collect::<Vec<_>>().join(" ")
            })
            .collect()
    }

    #[test]
    fn parity_rotates_left_symmetric() {
        // As in the kernel's raid5.c, ALGORITHM_LEFT_SYMMETRIC.
        assert_eq!(rows(4, 1, 4), ["0 1 2 P", "4 5 P 3", "8 P 6 7", "P 9 10 11"]);
        assert_eq!(
            rows(5, 2, 5),
            [
                "Q 0 1 2 P",
                "3 4 5 P Q",
                "7 8 P Q 6",
                "11 P Q 9 10",
                "P Q 12 13 14"
            ]
        );
        assert_eq!(rows(3, 0, 2), ["0 1 2", "3 4 5"]);
    }

    #[test]
    fn every_byte_has_one_place_and_pieces_end_at_units() {
        let shape = Shape {
            columns: 5,
            parity: 2,
            unit: 8192,
            rotation: 3,
        };
        let mut seen = std::collections::BTreeSet::new();
        for block in 0..5 * 3 * 2 * 4 {
            let piece = shape.piece(block * 4096, 65536);
            assert!(piece.within + piece.length == 8192);
            let column = shape.data_column(piece.row, piece.data);
            assert_eq!(shape.role(piece.row, column), Role::Data(piece.data));
            assert!(seen.insert((column, shape.in_member(&piece))));
        }
    }

    #[test]
    fn a_section_cut_at_a_row_keeps_its_places_with_the_right_rotation() {
        let whole = Shape {
            columns: 4,
            parity: 1,
            unit: 4096,
            rotation: 0,
        };
        let tail = Shape { rotation: 3, ..whole };
        for row in 0..8 {
            for column in 0..4 {
                assert_eq!(whole.role(row + 3, column), tail.role(row, column));
            }
        }
    }
}
