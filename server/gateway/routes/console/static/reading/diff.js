// Word differences of two texts, by the longest common subsequence.

const MOST_CELLS = 2_000_000;

/** Returns [[text, differs]…] for each side; a word includes the spaces before it. */
export function compared(left, right) {
	const [a, b] = [words(left), words(right)];
	if (a.length * b.length > MOST_CELLS) return [[[left, false]], [[right, false]]];
	const common = lengths(a, b);
	const sides = [[], []];
	let [i, j] = [0, 0];
	while (i < a.length || j < b.length) {
		if (i < a.length && j < b.length && same(a[i], b[j])) {
			add(sides[0], a[i++], false);
			add(sides[1], b[j++], false);
		} else if (j >= b.length || (i < a.length && common[i + 1][j] >= common[i][j + 1])) add(sides[0], a[i++], true);
		else add(sides[1], b[j++], true);
	}
	return sides;
}

const words = (text) => text.match(/\s*\S+/g) ?? [];

const same = (one, other) => one.trim() === other.trim();

function lengths(a, b) {
	const table = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
	for (let i = a.length - 1; i >= 0; i--) {
		for (let j = b.length - 1; j >= 0; j--) {
			table[i][j] = same(a[i], b[j]) ? table[i + 1][j + 1] + 1 : Math.max(table[i + 1][j], table[i][j + 1]);
		}
	}
	return table;
}

/** Appends a word, to the last entry if `differs` is equal. Marks start at a word and end at a line break. */
function add(side, word, differs) {
	const [lead] = word.match(/^\s*/);
	const last = side.at(-1);
	if (last && last[1] === differs && !(differs && lead.includes('\n'))) last[0] += word;
	else if (differs && lead) side.push([lead, false], [word.slice(lead.length), true]);
	else side.push([word, differs]);
}
