// Curves over the steps of several runs, drawn in SVG; a curve ends where its run does.
import { html, useWidth } from './html.js';
import { figure } from './words.js';

const HIGH = 240;
const [TOP, RIGHT, BOTTOM, LEFT] = [28, 10, 42, 46];
const LABEL = 76; // pixels that the name of a run takes

/**
 * `series` is [{label, points: [[x, y]…], dots}…], `runs` [[x before its first point, name]…], or nothing for one run;
 * `said` is the description for screen readers.
 */
export function Chart({ series, runs, across, up, said }) {
	const [around, wide] = useWidth();
	const points = series.flatMap((one) => one.points);
	const [xs, ys] = [ticks(points.map(([x]) => x), wide / 90, 1), ticks(points.map(([, y]) => y), 4, 0)];
	const end = Math.max(...points.map(([x]) => x), 1);
	const x = (value) => LEFT + ((wide - LEFT - RIGHT) * value) / end;
	const y = (value) => HIGH - BOTTOM - ((HIGH - TOP - BOTTOM) * value) / ys.at(-1);
	const begins = runs.map(([begin]) => begin);
	const room = (index) => x(begins[index + 1] ?? end) - x(begins[index]);
	return html`<figure class="chart">
		<div ref=${around}><svg width=${wide} height=${HIGH} role="img" aria-label=${said}>
			${ys.map((value) => html`<g key=${value} class="tick"><line x1=${LEFT} x2=${wide - RIGHT} y1=${y(value)} y2=${y(value)} />
				<text class="before" x=${LEFT - 8} y=${y(value) + 4}>${figure(value)}</text></g>`)}
			${xs.map((value) => html`<text key=${value} x=${x(value)} y=${HIGH - BOTTOM + 18}>${figure(value)}</text>`)}
			<text x=${(LEFT + wide - RIGHT) / 2} y=${HIGH - 4}>${across}</text>
			<text x=${-(TOP + HIGH - BOTTOM) / 2} y="12" transform="rotate(-90)">${up}</text>
			${runs.map(([begin, name], index) => html`<g key=${begin}>
				${begin > 0 && html`<line class="cut" x1=${x(begin)} x2=${x(begin)} y1=${TOP} y2=${HIGH - BOTTOM} />`}
				${room(index) > LABEL && html`<text x=${x(begin) + room(index) / 2} y="16">${name}</text>`}
			</g>`)}
			${series.map(({ label, points: own, dots }, index) => html`<g key=${label} class=${`curve-${index}`}>${dots
				? own.map(([at, value], place) => html`<circle key=${place} cx=${x(at)} cy=${y(value)} r="4" />`)
				: split(own, begins).map((run, place) => html`<polyline key=${place}
					points=${run.map(([at, value]) => `${x(at)},${y(value)}`).join(' ')} />`)}</g>`)}
		</svg></div>
		<figcaption>${series.map(({ label, dots }, index) => html`<span key=${label} class=${`key key-${index}`}>
			<i class=${dots ? 'dots' : ''} aria-hidden="true"></i>${label}</span>`)}</figcaption>
	</figure>`;
}

/** About `many` round numbers from 0 to the largest value or just above it. */
function ticks(values, many, least) {
	const rough = Math.max(least, Math.max(...values) / many, 1e-9);
	const ten = 10 ** Math.floor(Math.log10(rough));
	const step = ten * [1, 2, 5, 10].find((times) => times * ten >= rough);
	const last = least ? Math.floor : Math.ceil;
	return Array.from({ length: last(Math.max(...values, step) / step) + 1 }, (_, index) => index * step);
}

const split = (points, begins) => begins
	.map((begin, index) => points.filter(([at]) => at > begin && at <= (begins[index + 1] ?? Infinity)))
	.filter((run) => run.length);
