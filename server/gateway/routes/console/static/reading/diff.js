// Words of two texts that the other one does not have.

const MOST = 0.6; // share of marked words beyond which marks say no more than that the texts differ

/** Returns [[text, differs]…] for each side, a word with the spaces before it; nothing if they have little in common. */
export function compared(left, right) {
	const sides = [left, right].map((text) => text.match(/\s*\S+/g) ?? []);
	const known = sides.map((words) => new Set(words.map(bare)));
	const marked = sides.map((words, side) => words.map((word) => bare(word) !== '' && !known[1 - side].has(bare(word))));
	if (marked.flat().filter(Boolean).length > MOST * marked.flat().length) return [];
	return sides.map((words, side) => words.reduce((runs, word, place) => add(runs, word, marked[side][place]), []));
}

/** A word without case and punctuation. */
const bare = (word) => word.toLowerCase().replace(/[^\p{L}\p{N}]+/gu, '');

/** Appends a word, to the last entry if `differs` is equal. Marks start at a word and end at a line break. */
function add(side, word, differs) {
	const [lead] = word.match(/^\s*/);
	const last = side.at(-1);
	if (last && last[1] === differs && !(differs && lead.includes('\n'))) last[0] += word;
	else if (differs && lead) side.push([lead, false], [word.slice(lead.length), true]);
	else side.push([word, differs]);
	return side;
}
