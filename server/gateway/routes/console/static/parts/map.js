// The map of anchors in SVG: dots sized by items, and a user with lines to their anchors.
import { html, useEffect, useRef, useState } from './html.js';
import { percent } from './words.js';

const MARGIN = 44;
const CROWDED = 64; // with more anchors, only those near the user have a label

export function AnchorMap({ anchors, user }) {
	const around = useRef();
	const [wide, setWide] = useState(600);
	useEffect(() => {
		const sized = new ResizeObserver(([{ contentRect }]) => setWide(Math.round(contentRect.width)));
		sized.observe(around.current);
		return () => sized.disconnect();
	}, []);
	const high = Math.round(Math.min(560, Math.max(260, wide * 0.68)));
	const dots = anchors.filter(({ at }) => at);
	const here = user?.at;
	const place = frame([...dots.map(({ at }) => at), ...(here ? [here] : [])], wide, high);
	const most = Math.max(...dots.map(({ items }) => items));
	const byId = new Map(dots.map((dot) => [dot.id, dot]));
	const lines = here ? user.anchors.filter(({ id }) => byId.has(id)).map(({ id, weight, similarity }) => ({ id, weight: weight ?? similarity })) : [];
	const speaking = new Map(lines.map(({ id, weight }) => [id, weight]));
	const ties = lines.map(({ id, weight }) => `${id}, ${percent(weight)}`).join(' and ');
	const spot = spots();
	const labelled = (id) => dots.length <= CROWDED || speaking.has(id);
	const said = `Map of ${dots.length} anchors${here ? `, and ${user.user_id} with lines to ${ties}` : ''}`;
	return html`<div ref=${around}><svg class="map" width=${wide} height=${high} role="img" aria-label=${said}>
		${here && lines.map(({ id, weight }) => html`<${Tie} key=${id} from=${place(here)} to=${place(byId.get(id).at)} weight=${weight} />`)}
		${dots.map(({ id, items, at }) => {
			const [x, y] = place(at);
			const radius = (4 + 6 * Math.sqrt(items / (most || 1))) / (labelled(id) ? 1 : 2.5);
			return html`<g key=${id} class=${speaking.has(id) ? 'anchor speaks' : 'anchor'}>
				<title>${`${id}: ${items} items`}</title>
				<circle cx=${x} cy=${y} r=${radius} />
				${labelled(id) && html`<text ...${spot(x, y, radius)}>${id}</text>`}
			</g>`;
		})}
		${here && html`<${Person} at=${place(here)} name=${user.user_id} />`}
	</svg></div>`;
}

/** Places labels above, below or beside a dot, so that they do not overlap. */
function spots() {
	const taken = [];
	return (x, y, radius) => {
		const aside = radius + 16;
		const places = [[x, y - radius - 5], [x, y + radius + 13], [x + aside, y + 4], [x - aside, y + 4]];
		const near = ([a, b]) => taken.some(([c, d]) => Math.abs(a - c) < 28 && Math.abs(b - d) < 13);
		const free = places.find((at) => !near(at)) ?? places[0];
		taken.push(free);
		return { x: free[0], y: free[1] };
	};
}

const Tie = ({ from, to, weight }) => html`<line class=${weight < 0 ? 'tie less' : 'tie'} x1=${from[0]} y1=${from[1]}
	x2=${to[0]} y2=${to[1]} stroke-width=${1 + 7 * Math.abs(weight)} />`;

const Person = ({ at: [x, y], name }) => html`<g class="person">
	<title>${name}</title>
	<circle cx=${x} cy=${y} r="8" />
	<text x=${x} y=${y + 24}>${name.length > 24 ? `${name.slice(0, 23)}…` : name}</text>
</g>`;

/** Maps the bank's coordinates to pixels, with one scale for both axes to keep distances. */
function frame(points, wide, high) {
	const range = (axis) => [Math.min(...points.map((at) => at[axis])), Math.max(...points.map((at) => at[axis]))];
	const [[left, right], [low, top]] = [range(0), range(1)];
	const scale = Math.min((wide - 2 * MARGIN) / (right - left || 1), (high - 2 * MARGIN) / (top - low || 1));
	return ([x, y]) => [wide / 2 + (x - (left + right) / 2) * scale, high / 2 - (y - (low + top) / 2) * scale];
}
