// The map of anchors in SVG: dots sized by items, and a user with lines to their anchors.
import { html, useWidth } from './html.js';
import { percent, shortened } from './words.js';

const MARGIN = 44;
const CROWDED = 64; // with more anchors, only those near the user have a label
const LONGEST = 24; // characters of a label

export function AnchorMap({ anchors, user }) {
	const [around, wide] = useWidth();
	const high = Math.round(Math.min(560, Math.max(260, wide * 0.68)));
	const known = anchors.filter(({ at }) => at);
	const here = user?.at;
	const place = frame([...known.map(({ at }) => at), ...(here ? [here] : [])], wide, high);
	const most = Math.max(...known.map(({ items }) => items), 1);
	const lines = new Map(here ? user.anchors.map(({ id, weight, similarity }) => [id, weight ?? similarity]) : []);
	const dots = known.map(({ id, items, at }) => {
		const [x, y] = place(at);
		const named = known.length <= CROWDED || lines.has(id);
		return { id, items, x, y, named, speaks: lines.has(id), radius: (4 + 6 * Math.sqrt(items / most)) / (named ? 1 : 2.5) };
	});
	const [x, y] = here ? place(here) : [];
	const person = here && { id: shortened(user.user_id, LONGEST), x, y, radius: 8, named: true, speaks: true };
	const names = labels([person, ...dots].filter(Boolean), wide, high);
	const ties = dots.filter(({ speaks }) => speaks);
	const told = ties.map(({ id }) => `${id}, ${percent(lines.get(id))}`).join(' and ');
	const said = `Map of ${dots.length} anchors${here ? `, and ${user.user_id} with lines to ${told}` : ''}`;
	return html`<div ref=${around}><svg class="map" width=${wide} height=${high} role="img" aria-label=${said}>
		${ties.map((dot) => html`<line key=${dot.id} class=${lines.get(dot.id) < 0 ? 'tie less' : 'tie'} x1=${x} y1=${y} x2=${dot.x} y2=${dot.y}
			stroke-width=${Math.min(8, 1 + 7 * Math.abs(lines.get(dot.id)))} />`)}
		${dots.map((dot) => html`<g key=${dot.id} class=${dot.speaks ? 'anchor speaks' : 'anchor'}>
			<title>${`${dot.id}: ${dot.items} items`}</title>
			<circle cx=${dot.x} cy=${dot.y} r=${dot.radius} />
			${names.has(dot) && html`<text ...${names.get(dot)}>${dot.id}</text>`}
		</g>`)}
		${here && html`<g class="person"><title>${user.user_id}</title>
			<circle cx=${x} cy=${y} r=${person.radius} /><text ...${names.get(person)}>${person.id}</text></g>`}
	</svg></div>`;
}

/** Places names where they cover neither a dot nor another name: {x, y} by dot. Only who speaks has one in any case. */
function labels(dots, wide, high) {
	const taken = dots.map((dot) => [dot.x - dot.radius, dot.y - dot.radius, dot.x + dot.radius, dot.y + dot.radius]);
	const found = new Map();
	for (const dot of dots.filter(({ named }) => named).sort((a, b) => b.speaks - a.speaks)) {
		const [half, away] = [4 * dot.id.length, dot.radius + 5];
		const places = [[0, -away], [0, away + 9], [half + away, 4], [-half - away, 4]].map(([right, down]) => {
			const middle = Math.min(wide - half, Math.max(half, dot.x + right));
			return [middle, dot.y + down, [middle - half, dot.y + down - 10, middle + half, dot.y + down + 3]];
		});
		const covers = ([,, [left, top, right, bottom]]) => top < 0 || bottom > high
			|| taken.some(([l, t, r, b]) => left < r && right > l && top < b && bottom > t);
		const free = places.find((spot) => !covers(spot)) ?? (dot.speaks ? places[0] : null);
		if (!free) continue;
		taken.push(free[2]);
		found.set(dot, { x: free[0], y: free[1] });
	}
	return found;
}

/** Maps the bank's coordinates to pixels, with one scale for both axes to keep distances. */
function frame(points, wide, high) {
	const range = (axis) => [Math.min(...points.map((at) => at[axis])), Math.max(...points.map((at) => at[axis]))];
	const [[left, right], [low, top]] = [range(0), range(1)];
	const scale = Math.min((wide - 2 * MARGIN) / (right - left || 1), (high - 2 * MARGIN) / (top - low || 1));
	return ([x, y]) => [wide / 2 + (x - (left + right) / 2) * scale, high / 2 - (y - (low + top) / 2) * scale];
}
